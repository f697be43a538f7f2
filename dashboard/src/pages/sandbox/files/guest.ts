/** The files of one sandbox, as root sees them. */
import { ApiError, answer, api, request, type Schemas } from "$/api/client";
import { pictureType } from "./content";

export type Entry = Schemas["EntryBody"];

/** Where programs work that are not root. */
const USERS_HOME = "/home/user";
/** It is everywhere. */
const ROOTS_HOME = "/root";

/** So much of a text or of bytes is shown; a larger file is not edited here. */
export const MAX_SHOWN_BYTES = 1 << 20;
const MAX_PICTURE_BYTES = 16 << 20;

export interface Start {
  bytes: Uint8Array<ArrayBuffer>;
  /** There is no more than that. */
  whole: boolean;
}

export class Guest {
  readonly id: string;
  #at: { params: { path: { sandbox_id: string } } };

  constructor(id: string) {
    this.id = id;
    this.#at = { params: { path: { sandbox_id: id } } };
  }

  stat(path: string): Promise<Entry> {
    return answer(
      api.POST("/v1/sandboxes/{sandbox_id}/files/stat", { ...this.#at, body: { path, user: "" } }),
    );
  }

  /** The same, or null when there is no such file. */
  async find(path: string): Promise<Entry | null> {
    try {
      return await this.stat(path);
    } catch (thrown) {
      if (ApiError.of(thrown).status === 404) return null;
      throw thrown;
    }
  }

  /** Where one begins: the home of whoever has worked there. */
  async home(): Promise<Entry> {
    const users = await this.find(USERS_HOME);
    if (users?.type === "directory") {
      const inside = await this.list(USERS_HOME);
      if (inside.some((each) => !each.name.startsWith("."))) return users;
    }
    return await this.stat(ROOTS_HOME);
  }

  async list(path: string): Promise<Entry[]> {
    const { entries } = await answer(
      api.POST("/v1/sandboxes/{sandbox_id}/files/list", {
        ...this.#at,
        body: { path, user: "", depth: 1 },
      }),
    );
    return entries.sort(
      (a, b) => Number(b.type === "directory") - Number(a.type === "directory") || order(a, b),
    );
  }

  async makeDirectory(path: string): Promise<void> {
    await answer(
      api.POST("/v1/sandboxes/{sandbox_id}/files/mkdir", { ...this.#at, body: { path, user: "" } }),
    );
  }

  /** Makes an empty file where none is. */
  async makeFile(path: string): Promise<void> {
    await this.#refuseIfThere(path);
    await this.write(path, "");
  }

  /** Another name or place, where nothing is. */
  async move(source: string, destination: string): Promise<void> {
    await this.#refuseIfThere(destination);
    await answer(
      api.POST("/v1/sandboxes/{sandbox_id}/files/move", {
        ...this.#at,
        body: { source, destination, user: "" },
      }),
    );
  }

  async remove(path: string): Promise<void> {
    await answer(
      api.POST("/v1/sandboxes/{sandbox_id}/files/remove", {
        ...this.#at,
        body: { path, user: "" },
      }),
    );
  }

  async write(path: string, text: string): Promise<void> {
    await request(this.contentUrl(path), { method: "PUT", body: new TextEncoder().encode(text) });
  }

  /** Where a file's content is read and written. */
  contentUrl(path: string): string {
    return this.#url("files", path);
  }

  /** Where a directory is had as a tar; the tar of a link would hold no more than that. */
  treeUrl({ path, symlink_target }: Entry): string {
    return this.#url("files/tree", symlink_target || path);
  }

  /** The beginning of a file, or all of it; of a picture, as much as can be shown. */
  async read(path: string, signal: AbortSignal): Promise<Start> {
    const response = await request(this.contentUrl(path), { signal });
    const reader = response.body?.getReader();
    const pieces: Uint8Array[] = [];
    let [size, most, whole] = [0, MAX_SHOWN_BYTES, false];
    while (reader && size <= most) {
      const { done, value } = await reader.read();
      if (done) {
        whole = true;
        break;
      }
      pieces.push(value);
      size += value.length;
      if (pieces.length === 1 && pictureType(value)) most = MAX_PICTURE_BYTES;
    }
    if (!whole) void reader?.cancel().catch(() => {});
    const bytes = new Uint8Array(await new Blob(pieces as BlobPart[]).arrayBuffer());
    return { bytes: bytes.subarray(0, most), whole };
  }

  #url(what: string, path: string): string {
    return `/v1/sandboxes/${this.id}/${what}?path=${encodeURIComponent(path)}`;
  }

  /** Elsewhere a file that is written or moved takes the place of another without a word. */
  async #refuseIfThere(path: string): Promise<void> {
    if (await this.find(path)) {
      throw new ApiError(409, {
        code: "already_exists",
        message: `There is a file ${path} already`,
        hint: "choose another name",
      });
    }
  }
}

const COLLATOR = new Intl.Collator(undefined, { numeric: true });

function order(a: Entry, b: Entry): number {
  return COLLATOR.compare(a.name, b.name);
}
