// Streams an answer, and shows the server's gauges once a second. The token stays in the page: it goes into the
// Authorization header of the page's own requests, and nowhere else.
"use strict";

const element = (id) => document.getElementById(id);
const show = (id, text) => { element(id).textContent = text; };
const milliseconds = (seconds) => (Number.isFinite(seconds) ? `${(seconds * 1000).toPrecision(3)} ms` : "-");

function headers() {
  const token = element("token").value.trim();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Yields what each server-sent event holds.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function answer(signal) {
  const chat = element("chat").checked;
  const prompt = element("prompt").value;
  const started = performance.now();
  const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: Number(element("tokens").value),
      temperature: Number(element("temperature").value),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
  });
  if (!response.ok) throw new Error(await failure(response));
  let first = null;
  let firstCount = 0;
  for await (const event of events(response)) {
    const now = performance.now();
    const count = event.usage.completion_tokens;
    if (first === null) {
      first = now;
      firstCount = count;
      show("ttft", milliseconds((now - started) / 1000));
    }
    for (const choice of event.choices) element("answer").append(chat ? choice.delta.content : choice.text);
    show("count", count);
    if (count > firstCount) show("itl", milliseconds((now - first) / 1000 / (count - firstCount)));
  }
}

let stopper = null;

element("form").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  if (stopper) return;
  stopper = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  for (const id of ["answer", "error"]) show(id, "");
  for (const id of ["ttft", "itl", "count"]) show(id, "-");
  try {
    await answer(stopper.signal);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  stopper = null;
  element("send").disabled = false;
  element("stop").disabled = true;
});

element("stop").addEventListener("click", () => stopper?.abort());

// The sum of a metric's samples in Prometheus' text format; undefined where it has none.
function sample(text, name) {
  const lines = text.split("\n").filter((line) => line.startsWith(`jaxinfer_${name}{`));
  return lines.length ? lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0) : undefined;
}

let previous = {};

// The mean of what a histogram has seen since the last look, or of all where that is nothing.
function mean(text, name) {
  const now = { sum: sample(text, `${name}_sum`), count: sample(text, `${name}_count`) };
  const then = previous[name] ?? { sum: 0, count: 0 };
  if (now.count > then.count) {
    previous[name] = now;
    return (now.sum - then.sum) / (now.count - then.count);
  }
  return undefined;
}

async function look() {
  const response = await fetch("/metrics", { headers: headers() });
  if (!response.ok) return;
  const text = await response.text();
  const found = /model_name="((?:[^"\\]|\\.)*)"/.exec(text);
  if (found) show("model", found[1]);
  for (const [id, name] of [["server-ttft", "time_to_first_token_seconds"], ["server-itl", "inter_token_latency_seconds"]]) {
    const seconds = mean(text, name);
    if (seconds !== undefined) show(id, milliseconds(seconds));
  }
  show("running", sample(text, "num_requests_running") ?? "-");
  show("waiting", sample(text, "num_requests_waiting") ?? "-");
  const usage = sample(text, "kv_cache_usage_ratio");
  if (usage !== undefined) {
    show("cache", `${(usage * 100).toFixed(1)} %`);
    element("cache-meter").value = usage;
  }
  const queries = sample(text, "prefix_cache_queries_total");
  if (queries) show("prefix", `${((100 * sample(text, "prefix_cache_hits_total")) / queries).toFixed(0)} %`);
}

async function lookOn() {
  for (;;) {
    if (!document.hidden) await look().catch(() => show("running", "-"));
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

lookOn();
