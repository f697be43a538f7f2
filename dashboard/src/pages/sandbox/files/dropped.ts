/** What is dropped onto a page: files, and directories with all that is in them. */

export interface Dropped {
  /** Each by its path below what it was dropped on. */
  files: { path: string; file: File }[];
  /** Directories with nothing in them. */
  directories: string[];
}

/** Reads what was dropped. It has to be called before the event is over. */
export async function readDropped(transfer: DataTransfer): Promise<Dropped> {
  const found: Dropped = { files: [], directories: [] };
  const items = [...transfer.items].filter((each) => each.kind === "file");
  const given = items.map((each) => ({ entry: each.webkitGetAsEntry(), file: each.getAsFile() }));
  for (const { entry, file } of given) {
    if (entry) await walk(entry, "", found);
    else if (file) found.files.push({ path: file.name, file });
  }
  return found;
}

async function walk(entry: FileSystemEntry, above: string, found: Dropped): Promise<void> {
  const path = `${above}${entry.name}`;
  if (isFile(entry)) {
    const file = await new Promise<File>((resolve, reject) => entry.file(resolve, reject));
    found.files.push({ path, file });
  } else if (isDirectory(entry)) {
    const inside = await children(entry);
    if (!inside.length) found.directories.push(path);
    for (const each of inside) await walk(each, `${path}/`, found);
  }
}

async function children(directory: FileSystemDirectoryEntry): Promise<FileSystemEntry[]> {
  const reader = directory.createReader();
  const found: FileSystemEntry[] = [];
  // Browsers tell some at a time, and none at the end.
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) =>
      reader.readEntries(resolve, reject),
    );
    if (!some.length) return found;
    found.push(...some);
  }
}

function isFile(entry: FileSystemEntry): entry is FileSystemFileEntry {
  return entry.isFile;
}

function isDirectory(entry: FileSystemEntry): entry is FileSystemDirectoryEntry {
  return entry.isDirectory;
}
