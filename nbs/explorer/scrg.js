// The SCRG explorer: Eq. 3 of mgsr_nb.scrg on stored texts, and the corrections that follow. No library, no network.
(() => {
  const root = document.getElementById("scrg-explorer");
  const data = JSON.parse(root.querySelector("script.data").textContent);
  const make = (tag, attributes = {}, ...inside) => {
    const node = document.createElement(tag);
    Object.entries(attributes).forEach(([k, v]) => node.setAttribute(k, v));
    node.append(...inside);
    return node;
  };

  // error_position with MaxKL or FirstAbove(threshold): the index, or -1
  function errorPosition(text, { direction, detector, threshold }) {
    const kl = text.kl[direction];
    const rank = detector === "max" ? kl : kl.map((x, i) => x >= threshold ? -i : -Infinity);
    let best = -1;
    text.ids.forEach((id, i) => { if (id !== text.drawn[i] && rank[i] > -Infinity && (best < 0 || rank[i] > rank[best])) best = i; });
    return best;
  }
  const part = (direction, p, q) => direction === "student_teacher" ? q * Math.log(q / p) : p * Math.log(p / q);

  const control = name => root.querySelector(`[name=${name}]`);
  const shown = word => word.replaceAll("\n", "↵") || "·";
  const quoted = word => JSON.stringify(word);
  const number = x => x < 1e-3 ? x.toExponential(0) : x.toPrecision(2);
  const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
  const strip = root.querySelector(".tokens");
  let at = 0;
  data.texts.forEach((t, i) => control("text").add(new Option(t.prompt.length > 70 ? t.prompt.slice(0, 68) + " …" : t.prompt, i)));

  const show = (name, text, exact) => { const cell = root.querySelector(`[data-value=${name}]`); cell.textContent = text; cell.dataset.exact = exact; };
  const bar = (kind, x) => make("div", { class: "track" }, make("i", { class: kind, style: `left: 0; width: ${100 * x}%` }));
  const before = text => text.tokens.slice(0, at).join("");

  function correction(text, place) {
    const fragment = [];
    if (!place.rewrites.length) return [make("p", {}, make("i", {}, "Both wrote the same token here: it is no candidate, however large its KL, and SCRG never corrects it."))];
    const head = () => make("span", {}, shown(before(text)));
    const student = text.tokens[at], teacher = place.words[place.teacher], rest = text.tokens.slice(at + 1).join("");
    fragment.push(make("p", {}, make("b", {}, "The student wrote: "), head(), make("span", { class: "old" }, make("u", {}, shown(student)), shown(rest === "" ? " " : rest))));
    fragment.push(make("p", {}, make("b", {}, "Corrected here, it writes on like this, five times:")));
    fragment.push(make("ol", { class: "texts" }, ...place.rewrites.map(([words, logP]) => make("li", {}, head(), make("span", { class: "new" }, shown(teacher)), make("span", { class: "rest" }, words ? shown(words) : ""), " ",
      make("small", {}, logP === null || place.rest === null ? "nothing follows" : `${signed(logP - place.rest)} nats a token`)))));
    const both = place.rewrites.filter(([, logP]) => logP !== null), raised = both.filter(([, logP]) => logP > place.rest).length;
    fragment.push(make("p", {}, place.rest === null || !both.length ? "There is no rest to compare."
      : `The teacher's mean log-probability of the rest was ${signed(place.rest)} nats a token; ${raised} of ${both.length} re-generations have a higher one.`));
    return fragment;
  }

  function update() {
    const text = data.texts[+control("text").value];
    const o = { direction: control("direction").value, detector: control("detector").value, threshold: +control("threshold").value };
    control("threshold").disabled = o.detector === "max";
    root.querySelector("output[for=scrg-threshold]").textContent = o.threshold.toFixed(2) + " nats";
    at = Math.min(at, text.tokens.length - 1);
    const kl = text.kl[o.direction], error = errorPosition(text, o), place = text.places[at], top = Math.max(...kl);
    root.querySelector(".prompt").textContent = text.prompt;
    [...strip.children].forEach((button, i) => {
      const differs = text.ids[i] !== text.drawn[i];
      button.style.setProperty("--heat", (0.6 * kl[i] / top).toFixed(3));
      button.className = (differs ? "differs " : "") + (i === error ? "error" : "");
      button.setAttribute("aria-pressed", i === at);
      button.tabIndex = i === at ? 0 : -1;
      button.setAttribute("aria-label", `token ${i + 1}: ${text.tokens[i].trim() || "blank"}, KL ${kl[i].toFixed(2)} nats${differs ? ", the teacher drew " + text.places[i].words[text.places[i].teacher].trim() : ""}${i === error ? ", the error position" : ""}`);
    });
    show("error", error < 0 ? "none" : `${error + 1}: ${quoted(text.tokens[error])}`, error);
    show("place", `${at + 1} of ${text.tokens.length}: ${quoted(text.tokens[at])}`, at);
    show("kl", kl[at].toFixed(3) + " nats", kl[at]);
    const differ = text.ids.filter((id, i) => id !== text.drawn[i]).length;
    show("differ", `${differ} of ${text.tokens.length}`, differ);
    const student = place.words[place.student], teacher = place.words[place.teacher];
    root.querySelector(".said").textContent = `The student wrote ${quoted(student)} (it gave it ${number(place.q[place.student])}, the teacher ${number(place.p[place.student])}). The teacher drew `
      + (student === teacher && !place.rewrites.length ? "the same." : `${quoted(teacher)} (it gave it ${number(place.p[place.teacher])}, the student ${number(place.q[place.teacher])}).`);
    const most = Math.max(...place.p, ...place.q);
    root.querySelector("tbody").replaceChildren(...place.words.map((word, k) => {
      const [p, q] = [place.p[k], place.q[k]], nats = part(o.direction, p, q);
      const cell = make("td", { class: "right" }, signed(nats));
      cell.dataset.part = nats;
      const mark = k === place.student && k === place.teacher ? "both wrote it" : k === place.student ? "the student's" : k === place.teacher ? "the teacher's" : "";
      return make("tr", {}, make("td", { class: "word" }, shown(word.trim() || word), ...(mark ? [make("small", {}, mark)] : [])), make("td", { "aria-hidden": true }, bar("teacher", p / most), bar("student", q / most)), make("td", { class: "right" }, number(p)), make("td", { class: "right" }, number(q)), cell);
    }));
    root.querySelector(".correction").replaceChildren(...correction(text, place));
    return error;
  }
  function fill() {
    strip.replaceChildren(...data.texts[+control("text").value].tokens.map((token, i) => make("button", { "data-token": i }, shown(token))));
    at = 0;
    at = Math.max(0, update());
    update();
  }
  const move = (to, focus) => { at = Math.max(0, Math.min(strip.children.length - 1, to)); update(); if (focus) strip.children[at].focus(); };
  root.addEventListener("input", ({ target }) => target.name === "text" ? fill() : move(target.name === "threshold" || target.name === "detector" || target.name === "direction" ? Math.max(0, update()) : at));
  root.addEventListener("click", ({ target }) => {
    const { token, move: by } = target.dataset;
    if (token !== undefined) move(+token);
    else if (by === "error") move(Math.max(0, update()));
    else if (by) move(at + +by);
  });
  strip.addEventListener("keydown", event => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: strip.children.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); move(to, true); }
  });
  fill();
})();
