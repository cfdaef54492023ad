// Names of functions and tests break at their joints, and the claims ledger gets filters; without this script it shows
// every claim.
(function () {
  document.querySelectorAll(":is(.icl-ledger, .icl-map) code .pre").forEach((name) => {
    name.innerHTML = name.innerHTML.replace(/_+|::|\/|\.(?!py)/g, "$&<wbr>");
  });

  const tables = [...document.querySelectorAll("table.icl-ledger")];
  if (!tables.length) return;

  // --- what the tables say

  const chapterOf = (table) => table.closest("section");
  const partOf = (table) => chapterOf(table).parentElement;
  const parts = [...new Set(tables.map(partOf))];
  const sections = [...parts, ...tables.map(chapterOf)];
  const slug = (table) => table.querySelector('a[href*="#claim-"]').pathname.replace(/^.*\/|\.html$/g, "");
  const heading = (section) =>
    [...section.querySelector(":scope > h3, :scope > h4").childNodes]
      .filter((node) => !node.classList || !node.classList.contains("headerlink"))
      .map((node) => node.textContent)
      .join("");
  const rows = tables.flatMap((table) => {
    const [part, chapter] = [partOf(table), chapterOf(table)];
    return [...table.tBodies[0].rows].map((row) => ({
      row,
      text: `${heading(part)} ${heading(chapter)} ${row.textContent}`.toLowerCase(),
      verdict: row.querySelector("[data-verdict]").dataset.verdict,
      places: [slug(table), part.id],
      sources: [...row.querySelectorAll('a[href*="#cite-"]')].map((link) => link.hash.slice("#cite-".length)),
    }));
  });
  // --- the form

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const option = (value, text) => make("option", { value, textContent: text });

  const search = make("input", { type: "search", placeholder: "a word of the claim, a function, a test" });
  const badges = [...document.querySelectorAll("section table:not(.icl-ledger) [data-verdict]")];
  const toggles = badges.map((badge) => {
    const count = make("span", { className: "icl-count" });
    const button = make("button", { type: "button", className: "icl-toggle" }, badge.cloneNode(true), " ", count);
    button.setAttribute("aria-pressed", "false");
    return { button, count, verdict: badge.dataset.verdict };
  });

  const place = make("select", {}, option("", "all chapters"));
  for (const part of parts) {
    const group = make("optgroup", { label: heading(part) }, option(part.id, `all of “${heading(part)}”`));
    const own = tables.filter((table) => partOf(table) === part);
    group.append(...own.map((table) => option(slug(table), heading(chapterOf(table)))));
    place.append(group);
  }

  const source = make("select", {}, option("", "all sources"), option("none", "this book alone"));
  const works = new Map();
  document.querySelectorAll('table.icl-ledger a[href*="#cite-"]').forEach((link) => works.set(link.hash.slice(6), link));
  const names = [...works].map(([key, link]) => {
    const short = link.textContent.trim();
    return [key, short.includes(" ") ? link.title : `${short}: ${link.title}`];
  });
  names.sort((one, other) => one[1].localeCompare(other[1]));
  source.append(...names.map(([key, name]) => option(key, name)));

  const status = make("p", { className: "icl-status" });
  status.setAttribute("role", "status");
  const verdicts = make("fieldset", {}, make("legend", { textContent: "Verdict" }), ...toggles.map((toggle) => toggle.button));
  const form = make(
    "form",
    { className: "icl-filter" },
    verdicts,
    make("label", {}, "Search ", search),
    make("label", {}, "Chapter ", place),
    make("label", {}, "Source ", source),
    make("button", { type: "reset", className: "icl-reset", textContent: "Show all" }),
    status,
  );
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter the claims");
  parts[0].before(form);

  // --- filtering; the state of the form is kept in the address

  const isPressed = (button) => button.getAttribute("aria-pressed") === "true";
  const pressed = () => toggles.filter(({ button }) => isPressed(button)).map(({ verdict }) => verdict);

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = pressed();
    const kept = rows.filter(
      (entry) =>
        words.every((word) => entry.text.includes(word)) &&
        (!place.value || entry.places.includes(place.value)) &&
        (!source.value || (source.value === "none" ? !entry.sources.length : entry.sources.includes(source.value))),
    );
    for (const { count, verdict } of toggles) count.textContent = kept.filter((entry) => entry.verdict === verdict).length;
    const left = new Set(kept.filter((entry) => !chosen.length || chosen.includes(entry.verdict)).map((entry) => entry.row));
    for (const { row } of rows) row.hidden = !left.has(row);
    for (const section of sections) section.hidden = !section.querySelector("table.icl-ledger tbody tr:not([hidden])");
    status.textContent = `${left.size} of ${rows.length} claims`;
  }

  function write() {
    const state = new URLSearchParams();
    if (search.value) state.set("search", search.value);
    if (pressed().length) state.set("verdict", pressed().join(","));
    if (place.value) state.set("chapter", place.value);
    if (source.value) state.set("source", source.value);
    history.replaceState(null, "", `#${state}`.replaceAll("%2C", ","));
  }

  function read() {
    const hash = location.hash.replace(/^#verdict-/, "#verdict="); // the form that other pages link to
    if (hash && !hash.includes("=")) return show(); // a heading, not a filter
    const state = new URLSearchParams(hash.slice(1));
    const chosen = (state.get("verdict") || "").split(",");
    for (const { button, verdict } of toggles) button.setAttribute("aria-pressed", chosen.includes(verdict));
    search.value = state.get("search") || "";
    place.value = state.get("chapter") || "";
    source.value = state.get("source") || "";
    for (const select of [place, source]) if (select.selectedIndex < 0) select.value = "";
    show();
    if (hash) form.scrollIntoView();
  }

  const update = () => (write(), show());
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    for (const { button } of toggles) button.setAttribute("aria-pressed", "false");
    setTimeout(update);
  });
  for (const { button } of toggles)
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", !isPressed(button));
      update();
    });
  window.addEventListener("hashchange", read);
  read();
})();
