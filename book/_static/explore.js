// Interactive figures: sliders over grids that book/tools/explore.py has computed. In print and without scripts the
// still picture of the figure shows instead.
(function () {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const MARKERS = [
    (r) => `M${r},0A${r},${r} 0 1 1 ${-r},0A${r},${r} 0 1 1 ${r},0Z`,
    (r) => `M${-r},${-r}H${r}V${r}H${-r}Z`,
    (r) => `M0,${-1.2 * r}L${1.2 * r},${r}H${-1.2 * r}Z`,
    (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0Z`,
    (r) => `M0,${1.2 * r}L${1.2 * r},${-r}H${-1.2 * r}Z`,
    (r) => `M${-r},${-r / 3}H${-r / 3}V${-r}H${r / 3}V${-r / 3}H${r}V${r / 3}H${r / 3}V${r}H${-r / 3}V${r / 3}H${-r}Z`,
  ];
  const short = (value) => String(Number(value.toPrecision(3)));
  const capital = (words) => words[0].toUpperCase() + words.slice(1);

  function fill(node, parent, attributes, text) {
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }
  const html = (parent, tag, attributes = {}, text) => fill(document.createElement(tag), parent, attributes, text);
  const svg = (parent, tag, attributes = {}, text) => fill(document.createElementNS(SVG, tag), parent, attributes, text);

  // Axes as wide as their box; the result draws lines and dots in their coordinates. An axis has min, max, ticks and a
  // title, and may be logarithmic.
  function axes(box, height, x, y, name) {
    const margin = { left: 46, right: 8, top: 24, bottom: x.title ? 44 : 24 };
    const width = Math.max(box.clientWidth, 200);
    const [w, h] = [width - margin.left - margin.right, height - margin.top - margin.bottom];
    const share = (axis, v) =>
      axis.log ? Math.log(v / axis.min) / Math.log(axis.max / axis.min) : (v - axis.min) / (axis.max - axis.min);
    const [left, top] = [(v) => share(x, v) * w, (v) => (1 - share(y, v)) * h];
    const size = { width, height, viewBox: `0 0 ${width} ${height}` };
    const root = svg(box, "svg", { ...size, role: "img", "aria-label": name });
    const frame = svg(root, "g", { transform: `translate(${margin.left},${margin.top})` });
    x.ticks.forEach((v) => {
      svg(frame, "line", { class: "icl-grid", x1: left(v), x2: left(v), y1: 0, y2: h });
      svg(frame, "text", { x: left(v), y: h + 17, "text-anchor": "middle" }, v);
    });
    y.ticks.forEach((v) => {
      svg(frame, "line", { class: "icl-grid", x1: 0, x2: w, y1: top(v), y2: top(v) });
      svg(frame, "text", { x: -6, y: top(v) + 4, "text-anchor": "end" }, v);
    });
    svg(frame, "text", { x: -margin.left + 2, y: -10 }, y.title);
    svg(frame, "text", { x: w / 2, y: h + 38, "text-anchor": "middle" }, x.title || "");
    svg(frame, "path", { class: "icl-axis", d: `M0,0V${h}H${w}` });
    const inside = svg(frame, "svg", { width: w, height: h }); // what lies outside is cut off
    return {
      line(xs, ys, series, look = "") {
        const points = xs.map((v, i) => `${left(v).toFixed(1)},${top(ys[i]).toFixed(1)}`);
        svg(inside, "polyline", { class: `icl-line ${look}`, "data-series": series, points: points.join(" ") });
      },
      // Rows of abscissa, mean and standard error: large pale markers with bars of two standard errors to either side.
      dots(rows, series) {
        rows.forEach(([v, mean, se]) => {
          const ends = [mean - 2 * se, mean + 2 * se].map((end) => top(y.log ? Math.max(end, y.min) : end));
          const [x1, y1, y2] = [left(v), ...ends];
          svg(inside, "line", { class: "icl-bar", "data-series": series, x1, x2: x1, y1, y2 });
          this.marker(v, mean, series, 6, "icl-stored");
        });
      },
      marker(v, value, series, r, look) {
        const place = `translate(${left(v).toFixed(1)},${top(value).toFixed(1)})`;
        const shape = MARKERS[series === "grey" ? 3 : series](r);
        svg(inside, "path", { class: look, "data-series": series, transform: place, d: shape });
      },
    };
  }

  // Entries of a legend: series, look of its line ("none" for no line), whether it has dots, words.
  function legend(box, entries) {
    const list = html(box, "div", { class: "icl-legend" });
    entries.forEach(([series, look, dotted, words]) => {
      const entry = html(list, "span");
      const key = svg(entry, "svg", { width: 30, height: 14, "aria-hidden": "true" });
      if (look !== "none") {
        svg(key, "line", { class: `icl-line ${look}`, "data-series": series, x1: 1, x2: 29, y1: 7, y2: 7 });
      }
      const shape = MARKERS[series === "grey" ? 3 : series](5);
      const dot = { class: "icl-stored", "data-series": series, transform: "translate(15,7)" };
      if (dotted) svg(key, "path", { ...dot, d: shape });
      html(entry, "span", {}, words);
    });
  }

  // Put sliders into a figure: `knobs` are [label, words for each stop, first stop], and `draw(board, stops)` fills the
  // board and returns the sentence that reads the figure aloud.
  function interactive(id, knobs, draw) {
    const figure = document.getElementById(id);
    const panel = document.createElement("div");
    panel.className = "icl-knobs";
    figure.insertBefore(panel, figure.querySelector("figcaption"));
    figure.classList.add("icl-live");
    const board = html(panel, "div", { class: "icl-board" });
    const controls = html(panel, "div", { class: "icl-controls" });
    const inputs = knobs.map(([label, words, first], i) => {
      const row = html(controls, "div");
      const input = { id: `${id}-knob-${i}`, type: "range", min: 0, max: words.length - 1, step: 1 };
      html(row, "label", { for: input.id }, label);
      const value = html(row, "span", { "aria-hidden": "true" });
      return { node: html(row, "input", { ...input, value: first }), value, words };
    });
    const said = html(panel, "p", { class: "icl-said", "aria-live": "polite" });
    function redraw() {
      inputs.forEach(({ node, value, words }) => {
        value.textContent = words[node.value];
        node.setAttribute("aria-valuetext", words[node.value]);
      });
      board.replaceChildren();
      said.textContent = draw(board, inputs.map(({ node }) => Number(node.value)));
    }
    inputs.forEach(({ node }) => node.addEventListener("input", redraw));
    let width = 0;
    new ResizeObserver(() => {
      if (board.clientWidth !== width) redraw();
      width = board.clientWidth;
    }).observe(panel);
  }

  function drawTwin(data, board, [penalty, degree, head, prompts, width]) {
    const { ratios, mean } = data;
    const twin = degree < data.degrees.length ? degree + 1 : 0; // variant 0 is the layer itself
    const at = (table) => table[head][prompts][penalty];
    const layer = at(data.error)[0];
    const other = at(data.error)[twin];
    const linear = data.linear[prompts][penalty];
    const name = `twin of degree ${degree}`;
    const x = { min: 0.09, max: 4.6, log: true, ticks: [0.1, 0.25, 0.5, 1, 2, 4] };
    const y = { min: 0.3, max: 20, log: true, ticks: [0.3, 0.5, 1, 2, 5, 10, 20], title: "in-context error" };
    legend(board, [
      [0, "", true, "layer"],
      ...(twin ? [[1, "icl-dashed", at(data.stored)[twin].length > 0, name]] : []),
      ["grey", "icl-dashed", false, "mean answer"],
      ["grey", "icl-dotted", true, "linear attention"],
    ]);
    const plot = axes(board, 340, x, y, "In-context error against width over number of prompts");
    const ends = [x.min, x.max];
    const here = [ratios[width], ratios[width]];
    plot.line(here, [y.min, y.max], "grey", "icl-cursor");
    plot.line(ends, [mean, mean], "grey", "icl-dashed");
    plot.line(ends, [linear, linear], "grey", "icl-dotted");
    plot.dots([[4.3, ...data.storedLinear[prompts][penalty]]], "grey");
    plot.dots(at(data.stored)[0], 0);
    if (twin) plot.dots(at(data.stored)[twin], 1);
    plot.line(ratios, layer, 0);
    if (twin) plot.line(ratios, other, 1, "icl-dashed");

    const wide = degree === 0;
    const span = wide
      ? { min: -60, max: 120, ticks: [-50, 0, 50, 100] }
      : { min: -12, max: 24, ticks: [-10, 0, 10, 20] };
    const below = { ...x, title: "width over prompts k/n" };
    const gap = axes(board, 180, below, { ...span, title: "twin over layer, less one, in %" }, "Gap of the twin");
    gap.line(here, [span.min, span.max], "grey", "icl-cursor");
    gap.line(ends, [0, 0], 0);
    if (twin) gap.dots(at(data.gaps)[twin], 1);
    if (twin) gap.line(ratios, other.map((v, i) => 100 * (v / layer[i] - 1)), 1, "icl-dashed");

    const n = data.prompts[prompts];
    const top = layer.indexOf(Math.max(...layer));
    const place = ratios[top] === 1 ? "where neurons and prompts are equal in number" : `at k/n = ${ratios[top]}`;
    const peak =
      top > 0 && top < ratios.length - 1
        ? `the error of the layer peaks at ${short(layer[top])}, ${place}, and is ${short(layer.at(-1))} at k = 4n`
        : `the error of the layer has no peak and stays between ${short(Math.min(...layer))} and ${short(layer[top])}`;
    const [a, b] = [layer[width], other[width]];
    const share = short(100 * Math.abs(b / a - 1));
    const versus = twin ? `, that of its ${name} ${short(b)}, by the formula ${share} % ${b > a ? "more" : "less"}` : "";
    const missing = twin && !at(data.stored)[twin].length ? " No simulation of this twin is stored." : "";
    return (
      `${capital(data.heads[head])} neurons, penalty ${data.penalties[penalty]}, ${n} prompts: ${peak}. ` +
      `With ${Math.round(ratios[width] * n)} neurons (k/n = ${ratios[width]}) it is ${short(a)}${versus}. ` +
      `Predicting the mean answer costs ${short(mean)}, linear attention ${short(linear)}.${missing}`
    );
  }

  function drawModes(data, board, [spectrum, length, start]) {
    const { name, values } = data.spectra[spectrum];
    const course = data.courses[spectrum][length][start];
    const stored = data.stored[`${spectrum} ${length} ${start}`];
    const x = { min: data.times[0], max: data.times.at(-1), log: true, ticks: [1, 10, 100, 1000], title: "time t/T₁" };
    const y = { min: 0, max: 1.05, ticks: [0, 0.2, 0.4, 0.6, 0.8, 1], title: "learned share sⱼθⱼ" };
    const shown = course.flow.length;
    const words = (s) => (shown === 1 ? "all modes" : `s = ${s.toFixed(2)}`);
    const lines = [["grey", "", false, "exact flow"], ["grey", "icl-dashed", false, "logistic curve"]];
    legend(board, [...values.slice(0, shown).map((s, j) => [j, "", true, words(s)]), ...lines]);
    const plot = axes(board, 380, x, y, "Learned share of each mode against the time");
    course.flow.forEach((flow, j) => {
      const [half, limit] = [course.half[j], course.limits[j]];
      if (half) plot.line([half, half], [0, limit / 2], j, "icl-dotted");
      plot.line([x.max / 1.25, x.max], [limit, limit], j, "icl-limit");
      plot.line(data.times, course.logistic[j], j, "icl-dashed");
      if (stored) plot.dots(stored[j], j);
      plot.line(data.times, flow, j);
      if (half) plot.marker(half, limit / 2, j, 4.5, "icl-half");
    });
    const last = shown - 1;
    const when = (j) => `at ${short(course.half[j])} T₁`;
    const logistic = (j) => short(course.halfLogistic[j]);
    const slow = course.half[last]
      ? `${when(last)}; on their logistic curves they would be at ${logistic(0)} and ${logistic(last)} T₁`
      : `never, in so short a prompt; on their logistic curves they would be at ${logistic(0)} and ${logistic(last)} T₁`;
    const both = shown === 1 ? "" : `, that of eigenvalue ${short(values[last])} ${slow}`;
    const first = shown === 1 ? "all modes are" : "the mode of eigenvalue 1 is";
    const ends = shown === 1 ? short(course.limits[0]) : `${short(course.limits[0])} and ${short(course.limits[last])}`;
    const many = data.lengths[length];
    return (
      `${capital(name)}, ${many} example${many === 1 ? "" : "s"} a prompt, start ` +
      `${data.starts[start]}: ${first} half learned ${when(0)}${both}. Training ends at a share of ${ends}. ` +
      (stored ? "Pale dots are stored runs." : "No run is stored for this position.")
    );
  }

  const { icl_twin: twin, icl_modes: modes } = window;
  if (!twin || !modes) return; // a page without its grids keeps the still pictures
  const counts = twin.prompts.map((n) => `${n}, n/d² = ${n / twin.dim ** 2}`);
  const degrees = [...twin.degrees.map(String), "∞, the layer itself"];
  const knobs = [
    ["penalty λ", twin.penalties.map(String), 0],
    ["degree of the twin", degrees, 2],
    ["neurons", twin.heads, 0],
    ["prompts n", counts, 2],
    ["width k/n, to read off", twin.ratios.map(String), twin.ratios.indexOf(2)],
  ];
  interactive("fig-ex-twin", knobs, (board, stops) => drawTwin(twin, board, stops));
  const names = modes.spectra.map(({ name }) => name);
  const turned = [
    ["spectrum", names, 1],
    ["examples in a prompt", modes.lengths.map(String), modes.lengths.length - 1],
    ["size of the start", modes.starts.map(String), modes.starts.length - 1],
  ];
  interactive("fig-ex-modes", turned, (board, stops) => drawModes(modes, board, stops));
})();
