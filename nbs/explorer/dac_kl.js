// The DAC-KL explorer: the arithmetic of mgsr_nb.dac_kl on groups of classes, and its drawing. No library, no network.
(() => {
  const root = document.getElementById("dac-explorer");
  const data = JSON.parse(root.querySelector("script.dac-data").textContent);
  const sum = f => rows => rows.reduce((total, row) => total + f(row), 0);
  const sigmoid = x => 1 / (1 + Math.exp(-x));

  // rows {n, p, q, word}: n classes that share p and q, most likely first; neighbours with the same p are ties
  function read(position) {
    const rows = position.n.map((n, i) => ({ n, p: position.p[i], q: position.q[i], word: position.words[i] }));
    const P = sum(r => r.n * r.p)(rows), Q = sum(r => r.n * r.q)(rows);
    rows.forEach(r => { r.p /= P; r.q /= Q; });
    const ties = [];
    rows.forEach(r => { const last = ties.at(-1); if (last && last[0].p === r.p) last.push(r); else ties.push([r]); });
    let first = 0;
    ties.forEach(t => { const n = sum(r => r.n)(t); t.forEach(r => { r.rank = first; r.stop = first + n; }); first += n; });
    return { rows, ties, classes: first };
  }

  // [below, at most] of quantile_interval
  function intervals({ rows, ties, classes }, reading) {
    if (reading === "value") { rows.forEach(r => { r.below = r.most = r.p; }); return; }
    const weight = reading === "rank" ? r => r.n / classes : r => r.n * r.p;
    let share = 0;
    [...ties].reverse().forEach(t => {
      const next = share + sum(weight)(t);
      t.forEach(r => { r.below = share; r.most = next; });
      share = next;
    });
    ties[0].forEach(r => { r.most = 1; });
  }

  function evaluate(dist, { reading, u, l, temperature, target, remainder }) {
    intervals(dist, reading);
    const rows = dist.rows, best = rows[0].p;
    rows.forEach(r => {
      const mask = temperature === 0 ? +(r.most >= l && r.below <= u) : sigmoid((r.most - l) / temperature) * sigmoid((u - r.below) / temperature);
      r.w = r.p !== best ? mask : target === "twice" ? mask + 1 : target === "once" ? 1 : 0;
      r.kept = Math.min(r.w, 1);
    });
    const term = (p, q) => p > 0 ? p * Math.log(p / q) : 0;
    const of = f => sum(f)(rows);
    const P = of(r => r.n * r.w * r.p), Q = of(r => r.n * r.w * r.q);
    const loss = {
      as_printed: () => of(r => r.n * r.w * term(r.p, r.q)),
      renormalise: () => P > 0 ? of(r => r.n * r.w * term(r.p / P, r.q / Q)) : 0,
      bucket: () => of(r => r.n * r.kept * term(r.p, r.q)) + term(of(r => r.n * (1 - r.kept) * r.p), of(r => r.n * (1 - r.kept) * r.q)),
    }[remainder]();
    return { loss, kept_classes: of(r => r.n * r.kept), kept_mass: of(r => r.n * r.kept * r.p), student_mass: of(r => r.n * r.kept * r.q), full: of(r => r.n * term(r.p, r.q)) };
  }

  // ---- drawing: both axes logarithmic
  const H = 300, LEFT = 52, RIGHT = 10, TOP = 26, BOTTOM = 38;
  const svg = root.querySelector("svg");
  const add = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([k, v]) => node.setAttribute(k, v));
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  function draw(dist, { reading, u, l }) {
    const W = Math.max(300, Math.min(root.clientWidth || 720, 760));      // so that letters keep their size on a phone
    svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
    const low = Math.floor(Math.log10(Math.min(...dist.rows.map(r => Math.min(r.p, r.q)))));
    const x = rank => LEFT + (W - LEFT - RIGHT) * Math.log10(rank + 1) / Math.log10(dist.classes + 1);
    const y = p => TOP + (H - TOP - BOTTOM) * Math.log10(Math.max(p, 10 ** low)) / low;
    svg.replaceChildren();
    for (let e = 0; e >= low; e -= 2) {
      add("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(10 ** e), y2: y(10 ** e) });
      add("text", { x: LEFT - 6, y: y(10 ** e) + 4, "text-anchor": "end" }, e ? `1e${e}` : "1");
    }
    for (const rank of [1, 10, 100, 1000, 10000]) add("text", { x: x(rank - 1), y: H - BOTTOM + 16, "text-anchor": "middle" }, rank.toLocaleString("en"));
    add("text", { x: (LEFT + W) / 2, y: H - 4, "text-anchor": "middle" }, "class, the teacher's most likely first");
    add("text", { x: 4, y: 12 }, "probability");
    for (const tie of dist.ties) {
      const r = tie[0], n = sum(c => c.n)(tie), kept = sum(c => c.n * c.kept)(tie) / n;
      const box = { x: x(r.rank), y: y(r.p), width: x(r.stop) - x(r.rank) + 0.3, height: H - BOTTOM - y(r.p) };
      add("rect", { class: "dropped", ...box });
      if (kept > 0.005) add("rect", { class: "kept", opacity: kept, ...box });
    }
    const line = dist.ties.map(t => `${x((t[0].rank + t[0].stop - 1) / 2).toFixed(1)},${y(sum(c => c.n * c.q)(t) / sum(c => c.n)(t)).toFixed(1)}`);
    add("polyline", { class: "student", points: line.join(" ") });
    if (reading === "value") for (const [name, limit] of [["u", u], ["l", l]]) {
      add("line", { class: "limit", x1: LEFT, x2: W - RIGHT, y1: y(limit), y2: y(limit) });
      add("text", { x: W - RIGHT - 4, y: y(limit) + (name === "u" ? -4 : 13), "text-anchor": "end" }, name);
    }
  }

  // ---- controls
  const control = name => root.querySelector(`[name=${name}]`);
  const distributions = data.positions.map(read);
  data.positions.forEach((p, i) => control("position").add(new Option(p.name, i)));
  control("position").value = 1;
  const percent = x => (100 * x).toPrecision(3) + " %";
  function update(changed) {
    const o = { reading: control("reading").value, target: control("target").value, remainder: control("remainder").value, temperature: +control("temperature").value };
    if (+control("l").value > +control("u").value) changed === "l" ? control("u").value = control("l").value : control("l").value = control("u").value;
    o.u = +control("u").value; o.l = +control("l").value;
    const index = +control("position").value, dist = distributions[index], result = evaluate(dist, o);
    draw(dist, o);
    for (const name of ["u", "l", "temperature"]) root.querySelector(`output[for=dac-${name}]`).textContent = o[name].toFixed(3);
    const text = { loss: result.loss.toFixed(4) + " nats", full: result.full.toFixed(4) + " nats", kept_classes: result.kept_classes.toLocaleString("en", { maximumFractionDigits: 1 }) + " of " + dist.classes.toLocaleString("en"),
                   kept_mass: percent(result.kept_mass), student_mass: percent(result.student_mass) };
    for (const [name, shown] of Object.entries(text)) {
      const cell = root.querySelector(`[data-value=${name}]`);
      cell.textContent = shown; cell.dataset.exact = result[name];
    }
    svg.setAttribute("aria-label", `Probabilities of ${dist.classes.toLocaleString("en")} classes, the teacher's likeliest first; kept are ${text.kept_classes}, with ${text.kept_mass} of the teacher's mass and ${text.student_mass} of the student's`);
    root.querySelector(".dac-text").textContent = data.positions[index].text;
    root.querySelector(".dac-note").textContent = result.loss < 0 ? "Below 0: a sum over some of the classes is not a KL." : o.u === o.l ? "u = l: only a class that lies exactly there stays, and the target." : "";
    root.querySelector("tbody").replaceChildren(...dist.rows.slice(0, 8).map(r => {
      const row = document.createElement("tr");
      [JSON.stringify(r.word), percent(r.p), percent(r.q), r.w.toFixed(2)].forEach(t => { row.insertCell().textContent = t; });
      row.className = r.kept > 0.5 ? "in" : "out";
      return row;
    }));
  }
  root.addEventListener("input", event => update(event.target.name));
  window.addEventListener("resize", () => update());
  update();
})();
