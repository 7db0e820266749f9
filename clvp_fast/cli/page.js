"use strict";
const order = document.getElementById("order");
const said = document.getElementById("said");
const names = { rank: "rank", score: "score", seconds: "length", candidate: "number" };
order.addEventListener("change", () => {
  const key = order.value;
  const sign = key === "score" ? -1 : 1;
  for (const list of document.querySelectorAll("ol")) {
    const items = [...list.children];
    items.sort((a, b) => sign * (Number(a.dataset[key]) - Number(b.dataset[key])));
    list.append(...items);
  }
  said.textContent = "Sorted by " + names[key] + ".";
});
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
  });
}
