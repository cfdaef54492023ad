// Thins out a page before axe reads it: axe takes minutes for ten thousand glyph boxes, which hold no text anyway.
// A formula keeps its size and its role; of the words of code with the same colours the first one stays.
() => {
  // Everything is measured before anything changes, or each change would lay out the page anew.
  const formulas = [...document.querySelectorAll("mjx-container")].map((formula) => {
    const size = `width: ${formula.scrollWidth}px; height: ${formula.offsetHeight}px`;
    return [formula, `display: inline-block; overflow: hidden; ${size}`];
  });
  const words = [...document.querySelectorAll("div.highlight span")].map((word) => {
    const colours = [getComputedStyle(word).color, word.closest("div.highlight").parentElement.className];
    return [word, colours.join()];
  });
  for (const [formula, style] of formulas) {
    const stand_in = document.createElement("span");
    stand_in.textContent = "formula";
    stand_in.style.cssText = style;
    formula.replaceChildren(stand_in);
  }
  const seen = new Set();
  for (const [word, colours] of words) {
    if (seen.has(colours)) word.replaceWith(word.textContent);
    seen.add(colours);
  }
  document.querySelectorAll("div.highlight pre").forEach((code) => code.normalize());
};
