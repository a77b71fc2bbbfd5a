"""Make nbs/explorer/step.json: the chapter "One training step" as slides, each with its line of code, the shapes of its tensors and a picture of them.

The code cells of nbs/43_one_step.ipynb are executed in their order; after the cell that a slide belongs to, its tensors are looked at. The
lines of code are those of the chapter (a test looks for them there).
"""
import contextlib, io, json
from pathlib import Path
import matplotlib
import nbformat
import torch

ROOT = Path(__file__).resolve().parents[1]
OUT, CHAPTER = ROOT/'nbs'/'explorer'/'step.json', ROOT/'nbs'/'43_one_step.ipynb'
WIDE, FEW = 48, 8        # numbers of a hidden state; likeliest classes

def short(values): return [float(f'{float(v):.4g}') for v in values]


# ---- pictures: small dictionaries that step.js draws

def strip(s, ids, values, name='', marked=()):
    "A text with a value for each token."
    return {'name': name, 'tokens': s['words'](ids), 'values': short(values), 'marked': [int(m) for m in marked]}

def texts(*strips): return {'kind': 'texts', 'strips': list(strips)}

def grid(rows): return {'kind': 'grid', 'rows': {name: short(values) for name, values in rows.items()}}

def bars(labels, **series): return {'kind': 'bars', 'labels': labels, 'series': {name: short(v) for name, v in series.items()}}

def table(head, *rows): return {'kind': 'table', 'head': head, 'rows': [[str(c) for c in row] for row in rows]}

def masks(s):
    batch, kinds = s['batch'], {'attention_mask': s['batch'].attention_mask, 'response_mask': s['batch'].response_mask, 'supervised': s['supervised'](s['batch'])}
    return grid({f'{name}, text {b}': mask[b].int() for name, mask in kinds.items() for b in range(len(batch.input_ids))})

def shift(s):
    return table(['column', 'token', 'trained', 'it predicts'],
                 *((t, repr(s['token'][t]), 'yes' if s['rows'][0, t] else 'no', repr(s['token'][t + 1]) if s['rows'][0, t] else '') for t in s['near']))

def written(s): return texts(*(strip(s, y, [0] * len(y), f'text {b}') for b, (_, y) in enumerate(s['pairs'])))

def detected(s):
    return texts(*(strip(s, y, s['kl'][b, :len(y)], f'text {b}', (s['student_ids'] != s['teacher_ids'])[b, :len(y)]) for b, (_, y) in enumerate(s['pairs'])))

def errors(s):
    one = lambda name, b: repr(s['tokenizer'].decode([s[name][b, s['j'][b]]]))
    return table(['text', 'j', 'KL there', 'student wrote', 'teacher drew'], *((b, s['j'][b].item(), f"{s['kl'][b, s['j'][b]]:.3f}", one('student_ids', b), one('teacher_ids', b)) for b in (0, 1)))

def both(s):
    p, q, b = s['p_at_j'][0], s['q_at_j'][0], 0
    shown = torch.cat([p.topk(4).indices, q.topk(4).indices, s['student_ids'][b, s['j'][b], None], s['teacher_ids'][b, s['j'][b], None]]).unique()
    shown = shown[p[shown].argsort(descending=True)]
    return bars([repr(w) for w in s['words'](shown.tolist())], teacher=p[shown], student=q[shown])

def revised(s):
    rows = []
    for b, (_, y) in enumerate(s['revision'].pairs):
        j, old = s['revision'].position[b], s['pairs'][b][1]
        words = s['words']
        rows += [{'name': f'text {b}, before', 'parts': [['', ''.join(words(old[:j]))], ['old', ''.join(words(old[j:]))]]},
                 {'name': f'text {b}, after', 'parts': [['', ''.join(words(y[:j]))], ['new', words(y[j:j + 1])[0]], ['rest', ''.join(words(y[j + 1:]))]]}]
    return {'kind': 'parts', 'rows': rows}

def spans(s):
    return texts(*(strip(s, y.tolist(), w, f'text {b}') for b, (y, w) in enumerate(zip(s['distilled_ids'].split(s['micro'].lengths), s['micro'].pair_weight.split(s['micro'].lengths)))))

def states(s):
    hidden = s['text'].student_hidden.detach()[:12, :WIDE]
    return grid({f'{i}: {w!r}': row.abs() for i, (w, row) in enumerate(zip(s['words'](s['distilled_ids'][:12].tolist()), hidden))})

def predictions(s):
    n = (-(s['log_p'].exp() * s['log_p']).sum(-1)).argmax().item()      # the flattest teacher, as in the chapter
    shown = s['log_p'][n].topk(FEW).indices
    return bars([repr(w) for w in s['words'](shown.tolist())], teacher=s['log_p'][n, shown].exp(), student=s['log_q'][n, shown].detach().exp())

def clipped(s):
    n, shown = s['n'], s['order'][:12]
    return bars([repr(w) for w in s['words'](shown.tolist())], teacher=s['p'][:12], weight=s['clip'].mask[n].detach()[shown])

def terms(s):
    return texts(strip(s, s['data_text'].labels.tolist(), s['nll'].detach(), 'SFT, on the ground truth'), strip(s, s['distilled_ids'].tolist(), s['dac'].detach(), 'DAC-KL, on the revised texts'),
                 strip(s, s['distilled_ids'][:-1].tolist(), s['span'].detach(), 'span, weighted'))

def weighted(s): return {'kind': 'weights', 'terms': {name: x.item() for name, x in s['terms'].items()}, 'weights': {name: getattr(s['config'], f'{name}_weight') for name in s['terms']}, 'loss': s['loss'].item()}

def slopes(s): return bars([repr(w) for w in s['words'](s['shown'].tolist())], gradient=s['slope'][s['shown']])

def norms(s): return bars(list(s['norms'].index), norm=s['norms'])

def moved(s): return bars([f'{name}, nats' for name in s['table'].index], before=s['table']['before'], after=s['table']['after'])

def trainers(s): return table(['', 'by hand', 'trainer'], *((name, f'{x:.5f}', f"{s['row'][name]:.5f}") for name, x in s['hand'].items()))


# ---- the slides: (title, line of the cell after which it is taken, lines of code, tensors, picture, what is seen)

def of(*names): return lambda s: {name: s[name] for name in names}

SLIDES = [
    ('Tokens and masks', 'batch = collate(', ['batch = collate([(e.prompt_ids, e.response_ids) for e in examples], pad)'],
     lambda s: {'input_ids': s['batch'].input_ids, 'attention_mask': s['batch'].attention_mask, 'response_mask': s['batch'].response_mask}, masks,
     'Prompt and response are one row of ids, padded on the right. Three masks say what may be read, what is a response, and which rows are trained: the response moved one to the left.'),
    ('The shift by one', 'test_eq(ids[:len', ['rows, ids = supervised(batch), labels(batch)'], lambda s: {'supervised': s['rows'], 'labels': s['ids']}, shift,
     'Row t of the output predicts token t + 1. So the last token of the prompt is trained, and the last token of the response is not.'),
    ('Sampling', 'pairs, origin = source', ['pairs, origin = source(0, examples, [0, 1])'], lambda s: {}, written,
     'The student, which has just lost six layers, writes its own answers, at most 12 tokens each. Lists of ids, of any length.'),
    ('Detection', 'scores = scorer(', ['readings = scorer.read(pairs)'], lambda s: {'student_hidden': s['readings'][0].hidden, 'kl': s['scores'].kl, 'teacher_ids': s['scores'].teacher_ids, 'student_ids': s['scores'].student_ids}, detected,
     'Both models read the texts once. Colour: the KL from the student to the teacher. Underlined: the teacher drew another token there.'),
    ('The error position', 'j = error_position', ['j = error_position(kl, student_ids, teacher_ids)'], lambda s: {'kl': s['kl'], 'j': s['j']}, errors,
     'The largest KL among the tokens that differ (Eq. 3).'),
    ('Why there?', 'q_at_j, p_at_j', ['q_at_j, p_at_j = (log_probs(head_logits(m, r.hidden[[0, 1], places], vocab)).exp()'], of('q_at_j', 'p_at_j'), both,
     'The likeliest classes of both models at j in text 0, and the two tokens that were written.'),
    ('Re-generation', 'revision = revise', ['revision = revise(0, pairs, [0, 1])'], lambda s: {'teacher_hidden': s['revision'].teacher_hidden}, revised,
     "The teacher's token takes the place of the student's (Eq. 4), and the student writes on from there. The teacher has read the new texts along the way."),
    ('Spans', 'find_spans = SpanFinder', ['find_spans = SpanFinder(tokenizer, config.spans, config.span_length, config.seed,'],
     lambda s: {'distilled_ids': s['micro'].distilled.input_ids, 'pair_weight': s['micro'].pair_weight}, spans,
     'The phrases of the new texts give each pair of neighbours a weight: 1 over the tokens of its span. Colour: the weight of the pair with the next token.'),
    ('Hidden states', 'clip = objective.terms', ['text = distiller.text(micro.distilled, True, micro)'], lambda s: {'student_hidden': s['text'].student_hidden, 'teacher_hidden': s['text'].teacher_hidden}, states,
     f'The student reads the texts with a graph. Here the sizes of the first {WIDE} numbers of the first 12 of its states, one row a token.'),
    ('Logits and probabilities', 'clip = objective.terms', ['logits = head_logits(student, text.student_hidden, vocab)', 'log_q = log_probs(logits)'], of('logits', 'log_q', 'log_p'), predictions,
     "Each state becomes a number for every class, and a distribution. One row of them: the token where the teacher is least sure."),
    ('The clip', 'p, order = log_p[n]', ['clip = objective.terms["dac"].dac_kl.clip(log_q.exp(), log_p.exp())'], lambda s: {'mask': s['clip'].mask, 'upper': s['clip'].upper, 'lower': s['clip'].lower}, clipped,
     'The sub-network gives every token two limits. With the soft mask, classes between them weigh nearly 1, and those below the lower one a little.'),
    ('The terms, token by token', 'data_logits.retain_grad', ['dac, notes = objective.terms["dac"].dac_kl(log_q, log_p)', 'span = span_distance(log_q, log_p, config.span_relation) * micro.pair_weight[:-1]'], of('nll', 'dac', 'span'), terms,
     'Three vectors, not averaged yet. SFT is computed on the ground truth, the two others on the revised texts. A few tokens carry most of each.'),
    ('The loss', 'loss = (config.sft_weight', ['loss = (config.sft_weight * terms["sft"] + config.dac_weight * terms["dac"] + config.span_weight'], lambda s: {'loss': s['loss']}, weighted,
     'Each term is divided by its count, and Eq. 11 adds them up. Move the weights.'),
    ('The gradient of the logits', 'loss.backward()', ['loss.backward()', 'slope, q = data_logits.grad[n], data_logits[n].detach().softmax(-1)'], lambda s: {'gradient_of_logits': s['data_logits'].grad}, slopes,
     "At the ground-truth token that the student expects least: its probabilities, minus 1 at the true token. Descent raises what is below 0."),
    ('The gradient of the weights', 'loss.backward()', ['norms = gradient_norms(student)'], lambda s: {}, norms,
     'Its norm in each decoder layer, and in the rest: the embedding, which is also the head, and the last norm.'),
    ('The update', 'schedule.step()', ['norm = nn.utils.clip_grad_norm_(distiller.parameters(), config.max_grad_norm)', 'optimizer.step()'], lambda s: {'norm': s['norm']}, moved,
     'The gradient is cut to norm 1, and AdamW takes a step. The same batch, before and after.'),
    ("The trainer's step", 'row = trainer.step()', ['row = trainer.step()'], lambda s: {}, trainers,
     'The trainer does all of it in one call, on a copy of the student: the same numbers.'),
]

def described(tensors): return [{'name': name, 'shape': list(t.shape), 'type': str(t.dtype).removeprefix('torch.')} for name, t in tensors.items()]

def slides(cells):
    "Execute the cells (sources) in one namespace; the slides, in the order of SLIDES."
    space, found = {'__name__': 'chapter'}, {}
    for source in cells:
        with contextlib.redirect_stdout(io.StringIO()): exec(compile(source, 'chapter', 'exec'), space)
        for n, (title, after, code, tensors, picture, seen) in enumerate(SLIDES):
            if after in source:
                with torch.no_grad(): found[n] = {'title': title, 'code': code, 'tensors': described(tensors(space)), 'picture': picture(space), 'seen': seen}
    return [found[n] for n in range(len(SLIDES))]

def main():
    matplotlib.use('agg')
    cells = [c.source for c in nbformat.read(CHAPTER, as_version=4).cells if c.cell_type == 'code' and 'nbdev_export()' not in c.source]
    made = slides(cells)
    OUT.write_text(json.dumps(made, ensure_ascii=False, separators=(',', ':')), encoding='utf-8')
    print(len(made), 'slides,', OUT.stat().st_size, 'bytes')

if __name__ == '__main__': main()
