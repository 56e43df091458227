const search = document.getElementById("search"), shown = document.getElementById("shown");
const pills = [...document.querySelectorAll(".pill")];
const cards = [...document.querySelectorAll("section[data-title]")];

// A row stays if it holds every word of the search (its own text or its table's title) and one of the chosen statuses.
function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = pills.filter(pill => pill.getAttribute("aria-pressed") === "true").map(pill => pill.dataset.status);
  let count = 0;
  for (const card of cards) {
    let some = false;
    for (const row of card.querySelector("tbody").rows) {
      const text = (card.dataset.title + " " + row.textContent).toLowerCase();
      const found = [...row.cells].some(cell => chosen.includes(cell.dataset.status));
      row.hidden = !(words.every(word => text.includes(word)) && (found || !chosen.length));
      some ||= !row.hidden;
      count += !row.hidden;
    }
    card.hidden = !some;
    document.querySelector(`li[data-card="${card.id}"]`).hidden = !some;
  }
  shown.textContent = words.length || chosen.length ? `${count} rows` : "";
}

search.addEventListener("input", filter);
for (const pill of pills) {
  pill.addEventListener("click", () => {
    pill.setAttribute("aria-pressed", pill.getAttribute("aria-pressed") === "true" ? "false" : "true");
    filter();
  });
}

if (matchMedia("(max-width: 40rem)").matches) document.querySelectorAll("nav details").forEach(part => part.open = false);
