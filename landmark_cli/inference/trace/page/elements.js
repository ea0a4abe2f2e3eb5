// Making elements. Text is only ever set as text.

const byId = (id) => document.getElementById(id);
const thousands = (number) => number.toLocaleString("en");
const counted = (number, noun) => `${thousands(number)} ${noun}${number === 1 ? "" : "s"}`;

// Attributes that begin with -- are custom properties of its style.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// The text of one token as people can see it: what is white or nothing by a sign of its own.
function shownToken(text) {
  if (text === "") return [sign("·")];
  return text.split("\n").flatMap((part, at) => (at ? [sign("↵"), part] : [part])).filter((part) => part !== "");
}

function sign(text) {
  return element("span", {class: "sign"}, text);
}

function tokenName(text) {
  return text === "" ? "part of a character" : `“${text.replaceAll("\n", "↵")}”`;
}
