// The divergence explorer: mgsr_nb.divergences and their gradients on eight classes. No library, no network.
(() => {
  const root = document.getElementById("divergence-explorer");
  const position = JSON.parse(root.querySelector("script.data").textContent).positions[1], SINGLE = 7;
  const sum = values => values.reduce((a, b) => a + b, 0);
  const softmax = z => { const top = Math.max(...z), e = z.map(x => Math.exp(x - top)), total = sum(e); return e.map(x => x / total); };

  // the likeliest classes one by one, and all others as one
  const grouped = name => {
    const mass = position.n.map((n, i) => n * position[name][i]), total = sum(mass);
    return [...mass.slice(0, SINGLE), sum(mass.slice(SINGLE))].map(x => x / total);
  };
  const p = grouped("p"), own = grouped("q").map(Math.log);
  const words = [...position.words.slice(0, SINGLE).map(w => w.trim()), "all others"];

  // each: value, and its derivative by q; the options as in mgsr_nb.divergences
  const log = Math.log, total = (p, q, f) => sum(p.map((x, k) => f(x, q[k])));
  const LOSSES = {
    forward_kl: () => ({ f: (p, q) => p * log(p / q), d: (p, q) => -p / q }),
    reverse_kl: () => ({ f: (p, q) => q * log(q / p), d: (p, q) => log(q / p) + 1 }),
    symmetric_kl: () => ({ f: (p, q) => (p - q) * log(p / q) / 2, d: (p, q) => (log(q / p) + 1 - p / q) / 2 }),
    jsd: ({ beta: b }) => ({ f: (p, q) => { const m = b * p + (1 - b) * q; return b * p * log(p / m) + (1 - b) * q * log(q / m); },
                             d: (p, q) => (1 - b) * log(q / (b * p + (1 - b) * q)) }),
    tvd: () => ({ f: (p, q) => Math.abs(p - q) / 2, d: (p, q) => Math.sign(q - p) / 2 }),
    skew_forward_kl: ({ alpha: a }) => ({ f: (p, q) => p * log(p / (a * p + (1 - a) * q)), d: (p, q) => -p * (1 - a) / (a * p + (1 - a) * q) }),
    skew_reverse_kl: ({ alpha: a }) => ({ f: (p, q) => q * log(q / ((1 - a) * p + a * q)),
                                          d: (p, q) => { const m = (1 - a) * p + a * q; return log(q / m) + 1 - a * q / m; } }),
    adaptive_kl: ({ head }, q) => { const w = headShare(q, head);           // no gradient goes through the share
                                    return { f: (p, q) => w * p * log(p / q) + (1 - w) * q * log(q / p), d: (p, q) => -w * p / q + (1 - w) * (log(q / p) + 1) }; },
    alpha_beta: ({ power_p: a, power_q: b }) => b === 0 ? { f: (p, q) => (p ** a * a * log(p / q) - p ** a + q ** a) / a ** 2, d: (p, q) => (q ** (a - 1) - p ** a / q) / a }
      : a === 0 ? { f: (p, q) => (q ** b * b * log(q / p) - q ** b + p ** b) / b ** 2, d: (p, q) => q ** (b - 1) * log(q / p) }
      : { f: (p, q) => (a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b) - p ** a * q ** b) / (a * b), d: (p, q) => (q ** (a + b - 1) - p ** a * q ** (b - 1)) / a },
  };
  // how much of |p - q| lies in the head of p: its likeliest classes of at most `mass`, at least one
  function headShare(q, mass) {
    let before = 0, last = 0;
    for (const x of [...p].sort((a, b) => b - a)) { before += x; if (last && before > mass) break; last = x; }
    const gap = p.map((x, k) => Math.abs(x - q[k]));
    return sum(gap.filter((_, k) => p[k] >= last)) / Math.max(sum(gap), 1e-300);
  }
  function evaluate(name, z, options) {
    const q = softmax(z), { f, d } = LOSSES[name](options, q), slopes = p.map((x, k) => d(x, q[k]));
    const mean = sum(q.map((x, k) => x * slopes[k]));             // through the softmax
    return { value: total(p, q, f), gradient: q.map((x, k) => x * (slopes[k] - mean)) };
  }

  // ---- state and controls
  const RATE = 2, LOW = -12, HIGH = 6;
  const clipped = x => Math.min(HIGH, Math.max(LOW, x));
  const STARTS = { own, uniform: p.map(() => 0), wrong: p.map((_, k) => k === 5 ? 4 : 0), equal: p.map(log), lost: own.map((x, k) => k ? x : LOW) };
  let z = [...own], chosen = "forward_kl";
  const make = (tag, attributes = {}, ...inside) => {
    const node = document.createElement(tag);
    Object.entries(attributes).forEach(([k, v]) => node.setAttribute(k, v));
    node.append(...inside);
    return node;
  };
  const bar = (kind, left, width) => make("i", { class: kind, style: `left: ${left}%; width: ${width}%` });
  const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(3);
  const rows = words.map((word, k) => {
    const slider = make("input", { type: "range", min: LOW, max: HIGH, step: 0.1, "data-logit": k, "aria-label": `logit of ${word}` });
    const row = make("div", { class: "class" }, make("span", { class: "word" }, word), make("span", { "aria-hidden": true }), make("span", { class: "number" }), slider, make("span", { class: "number" }));
    root.querySelector(".classes").append(row);
    return row;
  });
  Object.keys(LOSSES).forEach(name => {
    const pick = make("input", { type: "radio", name: "loss", value: name });
    pick.checked = name === chosen;
    root.querySelector("tbody").append(make("tr", { "data-loss": name }, make("td", {}, make("label", {}, pick, " " + name)), make("td", { class: "right", "data-value": name }), make("td", { class: "right" }), make("td", {}, make("div", { class: "strip", "aria-hidden": true }))));
  });
  const option = name => +root.querySelector(`[name=${name}]`).value;
  const OPTIONS = ["alpha", "beta", "head", "power_p", "power_q"];
  const options = () => Object.fromEntries(OPTIONS.map(name => [name, option(name)]));

  function update() {
    const q = softmax(z), o = options(), found = Object.fromEntries(Object.keys(LOSSES).map(name => [name, evaluate(name, z, o)]));
    for (const name of OPTIONS) root.querySelector(`output[for=div-${name}]`).textContent = o[name].toFixed(2);
    const { value, gradient } = found[chosen], top = Math.max(...p, ...q), unit = 100 / top;
    rows.forEach((row, k) => {
      const [, bars, number, slider, slope] = row.children;
      bars.replaceChildren(make("div", { class: "track" }, bar("teacher", 0, p[k] * unit)), make("div", { class: "track" }, bar("student", 0, q[k] * unit)));
      number.textContent = `${p[k].toFixed(3)} / ${q[k].toFixed(3)}`;
      slider.value = z[k];
      slider.setAttribute("aria-valuetext", `${z[k].toFixed(1)}, probability ${q[k].toFixed(3)}`);
      slope.textContent = `${signed(gradient[k])} ${Math.abs(gradient[k]) < 5e-4 ? "·" : gradient[k] > 0 ? "↓" : "↑"}`;
    });
    const size = g => Math.hypot(...g);
    for (const [name, result] of Object.entries(found)) {
      const row = root.querySelector(`tr[data-loss=${name}]`), [, value, norm, strip] = row.children;
      const most = Math.max(...result.gradient.map(Math.abs), 1e-9);
      row.className = name === chosen ? "chosen" : "";
      value.textContent = result.value.toFixed(4);
      value.dataset.exact = result.value; row.dataset.gradient = JSON.stringify(result.gradient);
      norm.textContent = size(result.gradient).toFixed(3);
      strip.firstChild.replaceChildren(...result.gradient.map(g => {      // up: descent raises the logit
        const height = 50 * Math.abs(g) / most;
        return make("i", {}, make("i", { class: g > 0 ? "down" : "up", style: g > 0 ? `top: 50%; height: ${height}%` : `bottom: 50%; height: ${height}%` }));
      }));
    }
    const up = gradient.indexOf(Math.min(...gradient)), down = gradient.indexOf(Math.max(...gradient));
    root.querySelector(".said").textContent = size(gradient) < 1e-3 ? `${chosen}: ${value.toFixed(4)}. Nothing pulls any more.`
      : `${chosen}: ${value.toFixed(4)}. A step downhill raises ${words[up]} most and lowers ${words[down]} most.`;
  }
  root.addEventListener("input", ({ target }) => {
    if (target.dataset.logit) z[+target.dataset.logit] = +target.value;
    if (target.name === "loss") chosen = target.value;
    if (option("power_p") + option("power_q") === 0) target.value = target.step;      // not both 0
    update();
  });
  root.addEventListener("click", ({ target }) => {
    if (target.dataset.set) z = STARTS[target.dataset.set].map(clipped);
    else if (target.dataset.steps) for (let i = 0; i < +target.dataset.steps; i++) { const { gradient } = evaluate(chosen, z, options()); z = z.map((x, k) => clipped(x - RATE * gradient[k])); }
    else return;
    update();
  });
  root.querySelector(".text").textContent = position.text;
  update();
})();
