"""Make nbs/explorer/scrg.json: texts that a student wrote, both models' opinion of every token, and what follows each possible correction.

The student is the teacher without LAYERS of its layers, untrained: it writes sentences, and slips. For every token that the teacher would have
written otherwise, the page has five re-generations behind the teacher's token, so that any of them can be corrected, not only the one that SCRG takes.
"""
import json
from pathlib import Path
import torch
from mgsr_nb.data import load_train
from mgsr_nb.divergences import log_probs
from mgsr_nb.models import BUILTIN, block_influence, choose_layers, head_logits, load_model, load_tokenizer, stop_ids, truncate
from mgsr_nb.sampling import sampler
from mgsr_nb.scrg import DIRECTIONS, Scorer, corrected_prefix
from mgsr_nb.tokens import collate, encode

OUT = Path(__file__).resolve().parents[1]/'nbs'/'explorer'/'scrg.json'
LAYERS = 29                                   # of the teacher's 30
PROMPTS = 4, 0, 6                                  # numbers in the validation set; empty: print what the student writes to the first ones
TOKENS, REWRITES, SHOWN = 24, 5, 5            # of a text; of a correction; likeliest classes of each model

def short(values): return [float(f'{v:.4g}') for v in values]

def mean(values): return round(sum(values) / len(values), 4) if values else None

def likeliest(p, q, extra):
    "Classes of the SHOWN likeliest of p and of q (V,), and of `extra`, the teacher's likeliest first."
    return sorted({*p.topk(SHOWN).indices.tolist(), *q.topk(SHOWN).indices.tolist(), *extra}, key=lambda i: -p[i])

@torch.no_grad()
def explained(scorer, sample, stops, decode, prompt, response, name):
    """What the page has to know of one text: its tokens, at each the KL in both directions, the teacher's draw, the likeliest classes,
    and where the two tokens differ REWRITES texts that follow the teacher's, with the teacher's mean log-probability of them."""
    pairs = [(prompt, response)]
    scores = scorer(pairs, [('explorer', 'teacher', name)])
    hidden = [r.predicting([len(prompt)], [len(response)]) for r in scorer.read(pairs)]
    log_q, log_p = (log_probs(head_logits(m, h, scorer.vocab)) for m, h in zip(scorer.models, hidden))
    kl = {direction: short(f.from_log_probs(log_q, log_p).tolist()) for direction, f in DIRECTIONS.items()}
    drawn, places = scores.teacher_ids.tolist(), []
    prefixes = {i: corrected_prefix(response, i, theirs) for i, (mine, theirs) in enumerate(zip(response, drawn)) if mine != theirs}
    rewrites = rewritten(scorer, sample, set(stops), decode, prompt, response, prefixes, name)
    for i, (mine, theirs) in enumerate(zip(response, drawn)):
        classes = likeliest(log_p[i].exp(), log_q[i].exp(), (mine, theirs))
        places.append({'words': [decode([c]) for c in classes], 'p': short(log_p[i].exp()[classes].tolist()), 'q': short(log_q[i].exp()[classes].tolist()),
                       'student': classes.index(mine), 'teacher': classes.index(theirs), 'rest': mean(scores.log_p[i + 1:].tolist()), 'rewrites': rewrites.get(i, [])})
    return {'tokens': [decode([i]) for i in response], 'ids': response, 'drawn': drawn, 'kl': kl, 'places': places}

def rewritten(scorer, sample, stops, decode, prompt, response, prefixes, name):
    """For each of the corrected `prefixes` {position: ids} REWRITES continuations: [text, the teacher's mean log-probability of it in nats a token,
    None where nothing follows]. Both models have read the response once, and read on from there."""
    if not prefixes: return {}
    places = [i for i in prefixes for _ in range(REWRITES)]
    starts = [prompt + prefixes[i] for i in places]
    student, teacher = scorer.read([(prompt, response)])
    rows = torch.zeros(len(places), dtype=torch.long)
    for reading in (student, teacher): reading.keep(rows, starts)
    teacher.hidden = teacher.hidden[rows]
    rooms = [0 if prefixes[i][-1] in stops else TOKENS - len(prefixes[i]) for i in places]
    rests = sample(starts, [('explorer', 'rewrite', name, i, k % REWRITES) for k, i in enumerate(places)], rooms, student)
    teacher.replace([len(x) - 1 for x in starts], [x[-1:] + y for x, y in zip(starts, rests)])
    states, found = teacher.predicting([len(x) for x in starts], [len(y) for y in rests]), {}
    log_p = log_probs(head_logits(scorer.models[1], states, scorer.vocab)).gather(-1, torch.tensor([i for y in rests for i in y], dtype=torch.long)[:, None])
    for i, rest, said in zip(places, rests, log_p[:, 0].split([len(y) for y in rests])): found.setdefault(i, []).append([decode(rest), mean(said.tolist())])
    return found

@torch.no_grad()
def main():
    tokenizer, teacher = load_tokenizer(BUILTIN), load_model(BUILTIN)
    examples = [encode(e, tokenizer, 'alpaca', 160, 256) for e in load_train('tiny').validation]
    pad, stops, vocab = tokenizer.pad_token_id, stop_ids(teacher, tokenizer), len(tokenizer)
    batch = collate([(e.prompt_ids, e.response_ids) for e in examples[:4]], pad)
    student = truncate(teacher, choose_layers(teacher.config.num_hidden_layers, LAYERS, 'influence', block_influence(teacher, batch)))
    sample, scorer = sampler(student, stops, pad, vocab), Scorer(student, teacher, pad, vocab)
    texts = []
    for number in PROMPTS or range(12):
        e = examples[number]
        response, = sample([e.prompt_ids], [('explorer', 'sample', number)], [TOKENS])
        print(number, repr(e.example.instruction), repr(tokenizer.decode(response)), flush=True)
        if PROMPTS: texts.append({'prompt': e.example.instruction, **explained(scorer, sample, stops, tokenizer.decode, e.prompt_ids, response, number)})
    if not texts: return
    OUT.write_text(json.dumps({'texts': texts}, ensure_ascii=False, separators=(',', ':')), encoding='utf-8')
    print(OUT.stat().st_size, 'bytes')

if __name__ == '__main__': main()
