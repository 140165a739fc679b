"use strict";
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    const scroll = button.parentElement.nextElementSibling;
    const canvas = scroll.firstElementChild;
    const before = Number(canvas.style.getPropertyValue("--zoom")) || 1;
    const factor = Number(button.dataset.zoom);
    const after = factor ? Math.min(Math.max(before * factor, 1), 256) : 1;
    const middle = (scroll.scrollLeft + scroll.clientWidth / 2) / canvas.scrollWidth;
    canvas.style.setProperty("--zoom", String(after));
    scroll.scrollLeft = middle * canvas.scrollWidth - scroll.clientWidth / 2;
  });
}
