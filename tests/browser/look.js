// Lists what is wrong with a page as it stands: one line for each kind of problem and element.
() => {
  const width = document.documentElement.clientWidth;
  const main = document.querySelector("main") || document.body;
  const problems = [];

  function name(element) {
    const place = element.closest("[id]");
    const path = [];
    for (let e = element; e && e !== place && path.length < 3; e = e.parentElement) {
      path.unshift([e.localName, ...e.classList].join("."));
    }
    return `${place ? "#" + place.id : ""} ${path.join(" > ")} "${element.textContent.trim().slice(0, 40)}"`;
  }
  const report = (kind, elements) => [...elements].forEach((e) => problems.push(`${kind}: ${name(e)}`));
  const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
  function inside(element) {
    for (let e = element; e && e !== document.body; e = e.parentElement) if (scrolls(e)) return true;
    return false;
  }

  const math = [...document.querySelectorAll(".math")];
  report("formula not typeset", math.filter((e) => !e.querySelector("mjx-container")));
  report("formula with an error", document.querySelectorAll("mjx-merror, [data-mjx-error]"));
  report("empty formula", math.filter((e) => e.offsetParent && !e.querySelector("mjx-container")?.offsetWidth));
  const texts = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const parent = texts.currentNode.parentElement;
    if (/\\\(|\\\[|\$\$/.test(texts.currentNode.data) && !parent.closest("pre, code, script, style, mjx-container")) {
      report("TeX left in the text", [parent]);
    }
  }

  if (document.documentElement.scrollWidth > width) problems.push("the page scrolls sideways");
  const visible = [...main.querySelectorAll("*:not(mjx-container *, svg *)")].filter((e) => e.offsetParent);
  report("wider than the page", visible.filter((e) => e.getBoundingClientRect().right > width + 1 && !inside(e)));
  const cut = (e) => e.scrollWidth > e.clientWidth + 1 && !inside(e);
  report("formula cut off", [...main.querySelectorAll("mjx-container[display]")].filter(cut));

  report("image not loaded", [...document.images].filter((e) => !e.complete || !e.naturalWidth));
  report("image without alt text", [...document.images].filter((e) => (main.contains(e) ? !e.alt : e.alt === null)));
  return problems;
};
