// Thins out a page before axe reads it: axe takes minutes for ten thousand glyph boxes, which hold no text anyway.
// A formula keeps its size and its role; of the words of code with the same colours the first one stays.
() => {
  for (const formula of document.querySelectorAll("mjx-container")) {
    const { scrollWidth, offsetHeight } = formula;
    const stand_in = document.createElement("span");
    stand_in.textContent = "formula";
    stand_in.style.cssText = `display: inline-block; width: ${scrollWidth}px; height: ${offsetHeight}px; overflow: hidden`;
    formula.replaceChildren(stand_in);
  }
  const seen = new Set();
  for (const word of document.querySelectorAll("div.highlight span")) {
    const colours = [getComputedStyle(word).color, word.closest("div.highlight").parentElement.className].join();
    if (seen.has(colours)) word.replaceWith(word.textContent);
    seen.add(colours);
  }
  document.querySelectorAll("div.highlight pre").forEach((code) => code.normalize());
};
