"use strict";
const at = (id) => document.getElementById(id);
const models = new Map();
let running = null; // AbortController of the request in progress

function headers(more = {}) {
  const key = at("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

function report(message, error = false) {
  at("status").textContent = message;
  at("status").classList.toggle("error", error);
}

async function errorOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server answered ${reply.status}`;
  }
}

async function connect() {
  let reply;
  try {
    reply = await fetch("v1/models", { headers: headers() });
  } catch {
    return report("The server can't be reached.", true);
  }
  if (reply.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
    return report(at("key").value ? "The server doesn't accept this API key." : "This server needs an API key.", true);
  }
  if (!reply.ok) return report(await errorOf(reply), true);
  models.clear();
  for (const model of (await reply.json()).data) models.set(model.id, model.accel);
  at("model").replaceChildren(...[...models.keys()].map((name) => new Option(name)));
  at("model").disabled = at("run").disabled = false;
  report("");
  choose();
}

function choose() {
  const model = models.get(at("model").value);
  const speech = model.kind === "speech";
  at("text-row").hidden = at("options-row").hidden = speech;
  at("audio-row").hidden = !speech;
  at("run").textContent = speech ? "Transcribe" : "Generate";
  showFigures(model.verification);
}

function showFigures(verified) {
  at("certificate").hidden = false;
  const percent = (share) => `${Math.round(share * 1000) / 10}%`;
  const rows = [];
  if (!verified) {
    rows.push(["result", "not verified: its output was not compared with PyTorch's"]);
  } else {
    rows.push(["precision", verified.precision], ["verified", verified.how]);
    for (const [name, share] of Object.entries(verified.identical)) {
      rows.push([`identical to PyTorch, ${name}`, `${percent(share)} of ${verified.sequences[name]} sequences`]);
    }
    const [error, allowed] = [verified.largest_error, verified.allowed_error].map((value) => value.toExponential(1));
    rows.push(["largest error of an output", `${error} of its largest value (allowed: ${allowed})`]);
    for (const [name, value] of Object.entries(verified.metrics.ours ?? {})) {
      const torch = verified.metrics.pytorch?.[name];
      const beside = torch === undefined ? "" : ` (PyTorch: ${torch.toFixed(2)}%)`;
      rows.push([name.replaceAll("_", " "), `${value.toFixed(2)}%${beside}`]);
    }
  }
  at("figures").replaceChildren(
    ...rows.flatMap(([name, value]) => {
      const [term, description] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      description.textContent = value;
      return [term, description];
    }),
  );
}

function number(id) {
  const value = at(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function requestFor(name, kind) {
  const common = {
    model: name,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    seed: number("seed"),
  };
  const text = at("text").value;
  const chat = kind === "chat";
  const body = chat ? { ...common, messages: [{ role: "user", content: text }] } : { ...common, prompt: text };
  return [chat ? "v1/chat/completions" : "v1/completions", body];
}

// Yield the data of server-sent events; a part of an event may arrive alone.
async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

async function generate(name, kind, signal) {
  const [route, body] = requestFor(name, kind);
  const reply = await fetch(route, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!reply.ok) throw new Error(await errorOf(reply));
  const start = performance.now();
  let usage = null;
  let reason = null;
  for await (const data of eventsOf(reply)) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    for (const choice of event.choices) {
      at("output").append(choice.text ?? choice.delta.content ?? "");
      reason = choice.finish_reason ?? reason;
    }
  }
  if (usage === null) throw new Error("the reply ended too early");
  const seconds = (performance.now() - start) / 1000;
  const limit = reason === "length" ? ", ended by the limit of new tokens" : "";
  return `${usage.completion_tokens} tokens in ${seconds.toFixed(2)} s${limit}`;
}

async function transcribe(name, signal) {
  const [file] = at("audio").files;
  if (!file) throw new Error("Choose a sound file first.");
  const form = new FormData();
  form.append("model", name);
  form.append("file", file);
  const start = performance.now();
  const reply = await fetch("v1/audio/transcriptions", { method: "POST", headers: headers(), body: form, signal });
  if (!reply.ok) throw new Error(await errorOf(reply));
  at("output").append((await reply.json()).text);
  return `${((performance.now() - start) / 1000).toFixed(2)} s`;
}

async function run(event) {
  event.preventDefault();
  if (running || at("run").disabled) return;
  const name = at("model").value;
  const { kind } = models.get(name);
  running = new AbortController();
  at("run").disabled = true;
  at("stop").disabled = false;
  at("output").textContent = "";
  report("…");
  try {
    report(await (kind === "speech" ? transcribe(name, running.signal) : generate(name, kind, running.signal)));
  } catch (error) {
    report(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    at("run").disabled = false;
    at("stop").disabled = true;
  }
}

at("connect").addEventListener("click", connect);
at("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  connect();
});
at("model").addEventListener("change", choose);
at("form").addEventListener("submit", run);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
});
at("stop").addEventListener("click", () => running?.abort());
connect();
