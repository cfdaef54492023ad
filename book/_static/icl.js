// Boxes that scroll can be reached with the keyboard, and inline formulas wider than a phone scroll by themselves.
(function () {
  function settle() {
    document.querySelectorAll("p mjx-container, li mjx-container, figcaption mjx-container").forEach((formula) => {
      const room = formula.closest("p, li, figcaption").clientWidth;
      formula.classList.toggle("icl-wide", formula.firstElementChild.offsetWidth > room);
    });
    document
      .querySelectorAll("mjx-container, .pst-scrollable-table-container, .output.text_html, div.highlight pre")
      .forEach((box) => {
        if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
        else box.removeAttribute("tabindex");
      });
  }
  window.addEventListener("load", () => {
    // Previews are for pointers and keyboards, where Escape closes them; a finger just follows the link.
    if (window.tippy) {
      window.tippy.setDefaultProps({ touch: false });
      document.addEventListener("keydown", (event) => event.key === "Escape" && window.tippy.hideAll());
    }
    // Read out as it is written, "Search Ctrl+K", not as the shorter name that the theme gives it.
    document.querySelectorAll(".search-button-field").forEach((button) => button.removeAttribute("aria-label"));
    document.querySelectorAll("summary:has(> .toctree-toggle)").forEach((fold) => {
      fold.ariaLabel = `Pages of ${fold.closest("li").querySelector("a").textContent}`;
    });
    const mathjax = window.MathJax && window.MathJax.startup;
    Promise.resolve(mathjax && mathjax.promise).then(() => {
      settle();
      window.addEventListener("resize", settle);
    });
  });
})();
