// All that goes over the network: to this server, and nowhere else.

const KEY = "thinslice.key";

/** An answer that is an error, with the status and what the server says. */
export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY),
  set(value, isKept) {
    key.forget();
    (isKept ? localStorage : sessionStorage).setItem(KEY, value);
  },
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

async function request(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Retry once it runs.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // Not one of ours: a proxy's page.
  }
  return new ApiError(response.status, told.message ?? `The server answered with status ${response.status}.`, told.code);
}

export const plan = async () => (await request("/plan")).json();

/** The server's counters and gauges by name, without the prefix; those with labels are left out. */
export async function metrics() {
  const text = await (await request("/metrics")).text();
  return Object.fromEntries([...text.matchAll(/^thinslice_(\w+) (\S+)$/gm)].map((found) => [found[1], Number(found[2])]));
}

export async function render(text, isWhole) {
  const body = JSON.stringify({ text, is_whole: isWhole });
  return (await request("/page/render", { method: "POST", body })).json();
}

/** The chunks of an answer as they come. Throws ApiError, also where the stream breaks off. */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data: ")) continue;
    if (line === "data: [DONE]") return;
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new ApiError(500, event.error.message, event.error.code);
    yield event;
  }
  throw new ApiError(0, "The connection broke off before the answer ended.");
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The connection to the server was lost before the answer ended.");
    }
    if (part.done) return;
    const found = (rest + part.value).split("\n");
    rest = found.pop();
    yield* found;
  }
}
