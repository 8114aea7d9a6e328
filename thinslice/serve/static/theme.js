// Before anything is drawn, so that no page of the other colour flashes up.
const theme = localStorage.getItem("thinslice.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
