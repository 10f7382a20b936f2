"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text; // never markup: a model may have written it
    if (name) node.className = name;
    return node;
  };

  // Light and dark
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* a file may have no storage */ }
  const dark = () => (chosen ? chosen === "dark" : system.matches);
  const paint = () => { root.dataset.theme = dark() ? "dark" : "light"; };
  paint();

  // Charts
  const specs = read("specs");
  const views = new Map();
  const config = () => {
    const text = dark() ? "#c3cad3" : "#454b54";
    const line = dark() ? "#333a42" : "#e3e6ea";
    const font = "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif";
    return {
      background: "transparent", font, view: { stroke: null },
      axis: { labelColor: text, titleColor: text, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8 },
      legend: { labelColor: text, titleColor: text, labelFontSize: 12, symbolType: "square", orient: "bottom" },
      rule: { color: text },
      line: { strokeWidth: 2 },
    };
  };
  const draw = async (place) => {
    const name = place.dataset.chart;
    views.get(name)?.finalize();
    const options = { renderer: "svg", actions: false, config: config(), tooltip: { theme: dark() ? "dark" : "light" } };
    views.set(name, await vegaEmbed(place, specs[name], options));
    place.dataset.drawn = root.dataset.theme;
  };
  const drawAll = () => Promise.all([...document.querySelectorAll(".chart")].map(draw));
  document.getElementById("theme").addEventListener("click", () => {
    chosen = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", chosen); } catch { /* kept for this page alone */ }
    paint();
    drawAll();
  });
  system.addEventListener("change", () => { paint(); drawAll(); });
  drawAll();

  // Tokens
  const generations = read("generations");
  const drafters = Object.keys(generations).filter((name) => generations[name].length);
  if (!drafters.length) return;
  const get = (id) => document.getElementById(id);
  const [pickDrafter, pickTrace, place, tip] = ["pick-drafter", "pick-trace", "generation", "tip"].map(get);
  let tokens = [];

  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "(part of a character)";
  const options = (select, texts) => select.replaceChildren(...texts.map((text, i) => {
    const option = make("option", text);
    option.value = i;
    return option;
  }));
  const show = () => {
    hide();
    const trace = generations[drafters[pickDrafter.value]][pickTrace.value];
    tokens = trace.tokens;
    get("prompt").textContent = trace.prompt;
    place.replaceChildren(...tokens.map((token, i) => {
      const node = make("span", token.text, `tok ${token.origin}${token.text.includes("\n") ? " newline" : ""}`);
      node.dataset.i = i;
      node.tabIndex = i ? -1 : 0;
      node.setAttribute("role", "listitem");
      return node;
    }));
    const share = (origin) => tokens.filter((token) => token.origin === origin).length / tokens.length;
    const parts = ["draft", "lookup", "target"].map((origin) => `${origin} ${(100 * share(origin)).toFixed(0)} %`);
    get("shares").textContent = `τ ${trace.tau.toFixed(2)} · ${tokens.length} tokens: ${parts.join(", ")}`;
  };
  const list = () => {
    options(pickTrace, generations[drafters[pickDrafter.value]].map((t, i) => `${t.task}, T = ${t.temperature} (${i + 1})`));
    show();
  };
  const hide = () => {
    tip.hidden = true;
    place.querySelector(".on")?.classList.remove("on");
  };
  const line = (...parts) => {
    const node = make("p");
    node.append(...parts);
    return node;
  };
  const code = (text) => make("code", visible(text));
  const describe = (token) => {
    const who = { draft: "Drafted and accepted", lookup: "Looked up and accepted", target: "The target's own token" }[token.origin];
    const nodes = [line(make("b", who), ` in round ${token.round + 1}: `, code(token.text))];
    if (token.origin === "target") {
      nodes.push(token.proposed === null ? line("Nothing was proposed here.") : line("Proposed and rejected: ", code(token.proposed)));
    }
    if (token.confidence !== null) {
      nodes.push(line(`Chance given to the path down to the proposal: ${(100 * token.confidence).toFixed(0)} %`));
    }
    if (token.alternatives.length) nodes.push(line("What the draft had in mind:"));
    for (const [text, chance] of token.alternatives) {
      const row = make("div", undefined, "alt");
      const bar = make("i");
      bar.style.width = `${Math.max(2, 100 * chance)}%`;
      row.append(code(text), bar, make("span", `${(100 * chance).toFixed(1)} %`));
      nodes.push(row);
    }
    return nodes;
  };
  const tell = (node) => {
    hide();
    node.classList.add("on");
    tip.replaceChildren(...describe(tokens[node.dataset.i]));
    tip.hidden = false;
    const box = node.getClientRects()[0] ?? node.getBoundingClientRect();
    const left = Math.min(box.left, innerWidth - tip.offsetWidth - 12);
    const above = box.bottom + tip.offsetHeight + 12 > innerHeight && box.top > tip.offsetHeight + 60;
    tip.style.left = `${Math.max(12, left) + scrollX}px`;
    tip.style.top = `${(above ? box.top - tip.offsetHeight - 6 : box.bottom + 6) + scrollY}px`;
  };
  const token = (event) => event.target.closest?.("#generation .tok");
  place.addEventListener("mouseover", (event) => { if (token(event)) tell(token(event)); });
  place.addEventListener("mouseleave", hide);
  place.addEventListener("focusin", (event) => { if (token(event)) tell(token(event)); });
  document.addEventListener("click", (event) => { token(event) ? tell(token(event)) : hide(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && token(event) && place.children[Number(token(event).dataset.i) + step];
    if (next) { next.focus(); event.preventDefault(); }
  });
  options(pickDrafter, drafters);
  pickDrafter.addEventListener("change", list);
  pickTrace.addEventListener("change", show);
  list();
})();
