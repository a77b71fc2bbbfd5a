// One training step as slides: what tools/explorer_step.py took from the chapter. No library, no network.
(() => {
  const root = document.getElementById("step-slides");
  const slides = JSON.parse(root.querySelector("script.data").textContent);
  const make = (tag, attributes = {}, ...inside) => {
    const node = document.createElement(tag);
    Object.entries(attributes).forEach(([k, v]) => node.setAttribute(k, v));
    node.append(...inside);
    return node;
  };
  const shown = word => word.replaceAll("\n", "↵");
  const number = x => Math.abs(x) >= 1e-3 || x === 0 ? String(+x.toPrecision(3)) : x.toExponential(1);
  const largest = values => Math.max(...values.map(Math.abs), 1e-12);
  const heat = (x, top) => `--heat: ${(0.75 * Math.abs(x) / top).toFixed(3)}`;

  // one function a kind of picture: -> nodes
  const DRAW = {
    texts: ({ strips }) => strips.map(({ name, tokens, values, marked }) => {
      const top = largest(values);
      const words = tokens.map((t, i) => make("span", { style: heat(values[i], top), title: number(values[i]), ...(marked[i] ? { class: "marked" } : {}) }, shown(t)));
      const most = values.indexOf(Math.max(...values));
      return make("p", { class: "tokens" }, make("b", {}, name + (top > 1e-9 ? ` (most, ${number(values[most])}: “${tokens[most].trim()}”)` : "") + ": "), ...words);
    }),
    grid: ({ rows }) => {
      const top = largest(Object.values(rows).flat());
      const lines = Object.entries(rows).map(([name, values]) => make("div", { class: "gridrow" }, make("span", { class: "rowname", title: name }, name),
        make("div", { class: "cells", role: "img", "aria-label": `${name}: ${values.length} values, the largest ${number(Math.max(...values))} at column ${values.indexOf(Math.max(...values))}` }, ...values.map(x => make("i", { style: heat(x, top), title: number(x) })))));
      return lines;
    },
    bars: ({ labels, series }) => {
      const names = Object.keys(series), top = Object.fromEntries(names.map(n => [n, n === "weight" ? 1 : largest(names.filter(m => m !== "weight").flatMap(m => series[m]))]));
      const colour = (n, x) => n === "gradient" ? (x > 0 ? "down" : "up") : n;
      const key = names.length < 2 ? [] : [make("p", {}, names.map(n => `${n}`).join(" above "), " in each row")];
      return [...key, ...labels.map((label, k) => make("div", { class: labels.length > 14 ? "barrow many" : "barrow" }, make("span", { class: "word" }, label),
        make("div", { "aria-hidden": true }, ...names.map(n => make("div", { class: "track" }, make("i", { class: colour(n, series[n][k]), style: `left: 0; width: ${100 * Math.abs(series[n][k]) / top[n]}%` })))),
        make("span", { class: "number" }, names.map(n => number(series[n][k])).join(" / "))))];
    },
    table: ({ head, rows }) => [make("table", {}, make("thead", {}, make("tr", {}, ...head.map(h => make("th", {}, h)))), make("tbody", {}, ...rows.map(r => make("tr", {}, ...r.map(c => make("td", {}, c))))))],
    parts: ({ rows }) => rows.map(({ name, parts }) => make("p", {}, make("b", {}, name + ": "), ...parts.map(([kind, text]) => make("span", kind ? { class: kind } : {}, shown(text))))),
    weights: ({ terms, weights }) => {
      const sliders = Object.keys(terms).map(name => make("label", {}, `${name}_weight `, make("output", {}), make("input", { type: "range", name, min: 0, max: 2, step: 0.1, value: weights[name] })));
      const sum = make("p", { "data-value": "loss", "aria-live": "polite" }), bars = make("div");
      const box = make("div", {}, make("div", { class: "controls" }, ...sliders), sum, bars);
      const update = () => {
        const w = Object.fromEntries(sliders.map(s => [s.lastChild.name, +s.lastChild.value])), names = Object.keys(terms);
        sliders.forEach(s => { s.querySelector("output").textContent = (+s.lastChild.value).toFixed(1); });
        const loss = names.reduce((a, n) => a + w[n] * terms[n], 0);
        sum.textContent = names.map(n => `${w[n].toFixed(1)} × ${terms[n].toFixed(4)}`).join(" + ") + ` = ${loss.toFixed(4)} nats`;
        sum.dataset.exact = loss;
        bars.replaceChildren(...DRAW.bars({ labels: names.map(n => `${n}, weighted`), series: { norm: names.map(n => w[n] * terms[n]) } }));
      };
      box.addEventListener("input", update);
      update();
      return [box];
    },
  };

  let at = 0;
  const select = root.querySelector("select"), stage = root.querySelector(".stage");
  slides.forEach((s, i) => select.add(new Option(`${i + 1} of ${slides.length}: ${s.title}`, i)));
  function go(to) {
    at = Math.max(0, Math.min(slides.length - 1, to));
    const s = slides[at];
    select.value = at;
    stage.dataset.slide = at;
    stage.querySelector("h3").textContent = s.title;
    stage.querySelector(".said").textContent = s.seen;
    stage.querySelector("pre code").textContent = s.code.join("\n");
    stage.querySelector(".shapes").replaceChildren(...s.tensors.map(t => make("code", {}, `${t.name} (${t.shape.join(", ")}) ${t.type}`)));
    stage.querySelector(".picture").replaceChildren(...DRAW[s.picture.kind](s.picture));
    root.querySelector("[data-go='-1']").disabled = at === 0;
    root.querySelector("[data-go='1']").disabled = at === slides.length - 1;
  }
  root.addEventListener("click", ({ target }) => { if (target.dataset.go) go(at + +target.dataset.go); });
  select.addEventListener("input", () => go(+select.value));
  stage.addEventListener("keydown", event => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: slides.length - 1 }[event.key];
    if (to !== undefined && event.target === stage) { event.preventDefault(); go(to); }
  });
  let start = null;       // a swipe turns the page, unless it moves a slider
  stage.addEventListener("touchstart", e => { start = e.target.tagName === "INPUT" ? null : e.changedTouches[0]; }, { passive: true });
  stage.addEventListener("touchend", e => {
    const end = e.changedTouches[0], dx = start ? end.clientX - start.clientX : 0;
    if (Math.abs(dx) > 60 && Math.abs(dx) > 2 * Math.abs(end.clientY - start.clientY)) go(at + (dx < 0 ? 1 : -1));
  }, { passive: true });
  go(0);
})();
