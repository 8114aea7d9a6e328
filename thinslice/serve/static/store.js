// Conversations, kept in this browser's IndexedDB.

const NAME = "conversations";
let opened;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("thinslice", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(NAME, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opened;
}

async function run(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(NAME, mode);
    const asked = work(transaction.objectStore(NAME));
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export const put = (conversation) => run("readwrite", (store) => store.put(conversation));
export const get = (id) => run("readonly", (store) => store.get(id));
export const remove = (id) => run("readwrite", (store) => store.delete(id));

/** All of them, the latest first. */
export async function all() {
  const found = await run("readonly", (store) => store.getAll());
  return found.sort((one, other) => other.updated - one.updated);
}
