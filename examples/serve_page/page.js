// Asks the server about an image. All that comes from elsewhere is put in as text.
"use strict";
const find = (id) => document.getElementById(id);

function say(text, isError = false) {
  find("said").textContent = text;
  find("said").classList.toggle("error", isError);
}

async function ask(address, options) {
  const response = await fetch(address, options);
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Error(body?.error?.message ?? `The server answered with ${response.status}.`);
  return body;
}

function show(answers) {
  const rows = answers.map(({ label, score }) => {
    const [row, name, bar, number] = ["tr", "th", "td", "td"].map((tag) => document.createElement(tag));
    const meter = document.createElement("meter");
    meter.value = score;
    name.textContent = label;
    name.scope = "row";
    bar.append(meter);
    number.textContent = `${(100 * score).toFixed(0)} %`;
    number.className = "number";
    row.append(name, bar, number);
    return row;
  });
  document.querySelector("#answers tbody").replaceChildren(...rows);
  find("answers").hidden = !answers.length;
}

find("file").addEventListener("change", () => {
  const [file] = find("file").files;
  if (find("shown").src) URL.revokeObjectURL(find("shown").src);
  find("shown").hidden = !file;
  if (file) find("shown").src = URL.createObjectURL(file);
  find("url").value = "";
  find("answers").hidden = true;
  say("");
});

find("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = find("file").files;
  const url = find("url").value.trim();
  if (!file && !url) return say("Choose an image, or write its address.", true);
  find("answers").hidden = true;
  find("ask").disabled = true;
  say("…");
  try {
    const asJson = { body: JSON.stringify({ url }), headers: { "Content-Type": "application/json" } };
    const asFile = { body: file, headers: { "Content-Type": "application/octet-stream" } };
    const address = `predict/${encodeURIComponent(find("task").value)}`;
    const { answers } = await ask(address, { method: "POST", ...(url ? asJson : asFile) });
    say(answers[0]?.label ?? "none of these"); // a task of several labels an image may name none
    show(answers);
  } catch (error) {
    say(error.message, true);
  } finally {
    find("ask").disabled = false;
  }
});

ask("tasks").then(
  ({ tasks }) => find("task").append(...tasks.map((name) => new Option(name, name))),
  (error) => say(error.message, true),
);
