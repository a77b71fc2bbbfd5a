"""Make nbs/explorer/data.json and phrase.json: what teacher and student say about the next tokens of a real text, small enough for a web page.

The likeliest classes are kept one by one. The rest is grouped: neighbours in the teacher's order get their mean probability, and are then
split by what the student thinks of them. So ranks and masses stay right, and the whole vocabulary fits a few kilobytes.
Of a phrase, only the classes are kept that two neighbouring predictions share most.
"""
import json
from pathlib import Path
import torch
from mgsr_nb.tokens import alpaca_prompt, collate
from mgsr_nb.divergences import forward_kl, log_probs
from mgsr_nb.models import BUILTIN, block_influence, choose_layers, head_logits, hidden_states, load_model, load_tokenizer, truncate
from mgsr_nb.span import SpanFinder, span_distance

OUT = Path(__file__).resolve().parents[1]/'nbs'/'explorer'/'data.json'
INSTRUCTION = 'What is the capital of France, and what is it known for?'
RESPONSE = 'The capital of France is Paris. It is known for its art, its food and the Eiffel Tower.'
LAYERS = 24                                    # of the teacher's 30, as in the quickstart
SHARED = 8                                     # classes of a phrase, for each pair of neighbours
SINGLE, GROWTH, SPLIT = 60, 1.04, 3            # classes one by one; how fast groups grow with the rank; how often each is split

def grouped(p, q):
    "Lists n, p, q: SINGLE classes of p (V,), most likely first, then groups of n classes with their mean p (the same in SPLIT neighbours) and mean q."
    order = p.argsort(descending=True, stable=True)
    p, q = p[order], q[order]
    rows, first = [(1, a, b) for a, b in zip(p[:SINGLE].tolist(), q[:SINGLE].tolist())], SINGLE
    while first < len(p):
        stop = min(len(p), max(first + SPLIT, round(first * GROWTH)))
        parts = q[first:stop].sort(descending=True).values.tensor_split(SPLIT)
        rows += [(len(part), p[first:stop].mean().item(), part.mean().item()) for part in parts if len(part)]
        first = stop
    n, p, q = zip(*rows)
    return order, list(n), [float(f'{x:.4g}') for x in p], [float(f'{x:.4g}') for x in q]

def expanded(position):
    "Teacher and student of a position of the file, (V,) float64, each summing to 1: what mgsr_nb.dac_kl reads."
    n = torch.tensor(position['n'])
    p, q = (torch.tensor(position[k], dtype=torch.float64).repeat_interleave(n) for k in 'pq')
    return p / p.sum(), q / q.sum()

def phrase(tokenizer, response, log_q, log_p):
    "The longest phrase of the response: its tokens, the classes that its neighbours share most, (n, C) probabilities of both models there, and Eq. 9 over all classes."
    first, stop = max(SpanFinder(tokenizer)(response), key=lambda s: s[1] - s[0])
    log_q, log_p = log_q[first:stop], log_p[first:stop]
    product = torch.maximum(log_q[:-1] + log_q[1:], log_p[:-1] + log_p[1:])
    classes = product.topk(SHARED, -1).indices.unique()
    rows = lambda x: [[float(f'{v:.4g}') for v in row] for row in x[:, classes].exp().tolist()]
    return {'text': tokenizer.decode(response[:first]), 'tokens': [tokenizer.decode([i]) for i in response[first:stop]], 'classes': [tokenizer.decode([i]) for i in classes.tolist()],
            'p': rows(log_p), 'q': rows(log_q), 'distance': [float(f'{v:.4g}') for v in span_distance(log_q, log_p).tolist()]}

@torch.no_grad()
def main():
    tokenizer, teacher = load_tokenizer(BUILTIN), load_model(BUILTIN)
    prompt, response = (tokenizer(t, add_special_tokens=False)['input_ids'] for t in (alpaca_prompt(INSTRUCTION), RESPONSE))
    batch = collate([(prompt, response)], pad_id=tokenizer.pad_token_id)
    kept = choose_layers(teacher.config.num_hidden_layers, LAYERS, 'influence', block_influence(teacher, batch))
    student, vocab = truncate(teacher, kept), len(tokenizer)
    rows = slice(len(prompt) - 1, len(prompt) + len(response) - 1)      # row t predicts token t + 1
    logits_q, logits_p = (head_logits(m, hidden_states(m, batch), vocab)[0, rows] for m in (student, teacher))
    entropy = -(log_probs(logits_p).exp() * log_probs(logits_p)).sum(-1)
    by_entropy = entropy.argsort().tolist()
    chosen = {'a certain teacher': by_entropy[len(by_entropy) // 10], 'a teacher in doubt': by_entropy[len(by_entropy) * 6 // 10], 'a teacher with many choices': by_entropy[-1]}
    positions = []
    for name, i in chosen.items():
        p, q = (log_probs(x[i]).exp() for x in (logits_p, logits_q))
        order, n, ps, qs = grouped(p, q)
        text = f'{INSTRUCTION}\n{tokenizer.decode(response[:i])}'
        positions.append({'name': name, 'text': text, 'words': [tokenizer.decode([t]) for t in order[:8].tolist()], 'n': n, 'p': ps, 'q': qs})
        a, b = expanded(positions[-1])
        print(f"{name}: {text[-30:]!r}, next {positions[-1]['words'][:4]}, entropy {entropy[i]:.2f}, KL {forward_kl(logits_q[i], logits_p[i]):.4f}, grouped {(a * (a / b).log()).sum():.4f}")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({'teacher': 'SmolLM2-135M-Instruct', 'student': f'the same without {30 - LAYERS} of its 30 layers, not trained yet', 'positions': positions}, separators=(',', ':')), encoding='utf-8')
    found = phrase(tokenizer, response, log_probs(logits_q), log_probs(logits_p))
    OUT.with_name('phrase.json').write_text(json.dumps(found, separators=(',', ':')), encoding='utf-8')
    print(OUT.stat().st_size, 'bytes;', repr(''.join(found['tokens'])), found['distance'], OUT.with_name('phrase.json').stat().st_size, 'bytes')

if __name__ == '__main__': main()
