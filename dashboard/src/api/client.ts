/**
 * The native API as this page calls it: by the session's cookie, with the types of its OpenAPI
 * document. What goes wrong is one kind of error.
 */
import createClient, { type Middleware } from "openapi-fetch";
import type { components, paths } from "./schema";

export type Schemas = components["schemas"];

/** What the API, or the way to it, refused. */
export class ApiError extends Error {
  readonly code: string;
  readonly hint: string;
  readonly requestId: string;
  readonly retryable: boolean;
  /** Of HTTP; 0 when there was no answer. */
  readonly status: number;

  constructor(
    status: number,
    told: {
      code: string;
      message: string;
      hint?: string;
      request_id?: string;
      retryable?: boolean;
    },
  ) {
    super(told.message);
    this.name = "ApiError";
    this.status = status;
    this.code = told.code;
    this.hint = told.hint ?? "";
    this.requestId = told.request_id ?? "";
    this.retryable = told.retryable ?? false;
  }

  /** Whatever was thrown, as one of these. */
  static of(thrown: unknown): ApiError {
    if (thrown instanceof ApiError) return thrown;
    if (thrown instanceof TypeError) {
      return new ApiError(0, {
        code: "unreachable",
        message: "The server cannot be reached",
        hint: "check that it runs and that you are online, then try again",
        retryable: true,
      });
    }
    const message = thrown instanceof Error ? thrown.message : String(thrown);
    return new ApiError(0, { code: "internal", message });
  }

  /** Of an answer that is no success. */
  static async from(response: Response): Promise<ApiError> {
    let told: unknown;
    try {
      told = ((await response.json()) as { error?: unknown }).error;
    } catch {
      told = undefined;
    }
    return ApiError.told(response, told);
  }

  static told(response: Response, error: unknown): ApiError {
    if (typeof error === "object" && error !== null && "message" in error) {
      return new ApiError(response.status, error as { code: string; message: string });
    }
    return new ApiError(response.status, {
      code: "internal",
      message: `The server answered ${response.status}`,
      request_id: response.headers.get("x-request-id") ?? "",
    });
  }
}

const SAFE = new Set(["GET", "HEAD", "OPTIONS"]);

/** What each request carries, and what is done when the session is over; see `session`. */
export const credentials = { csrfToken: "", onEnded: () => {} };

const middleware: Middleware = {
  onRequest({ request }) {
    if (!SAFE.has(request.method)) request.headers.set("X-CSRF-Token", credentials.csrfToken);
    return request;
  },
  onResponse({ response }) {
    if (response.status === 401) credentials.onEnded();
  },
};

/** Typed calls of each route: `api.GET("/v1/sandboxes", {params: {query: {limit: 10}}})`. */
export const api = createClient<paths>({ baseUrl: location.origin, credentials: "same-origin" });
api.use(middleware);

/**
 * The answer of a call of `api`. Throws ApiError.
 *
 *     const page = await answer(api.GET("/v1/sandboxes"));
 */
export async function answer<T>(
  call: Promise<{ data?: T; error?: unknown; response: Response }>,
): Promise<T> {
  let found;
  try {
    found = await call;
  } catch (thrown) {
    throw ApiError.of(thrown);
  }
  if (!found.response.ok) {
    // What was read of a body that is no JSON is its text.
    const told = found.error as { error?: unknown } | string | undefined;
    throw ApiError.told(found.response, typeof told === "object" ? told.error : undefined);
  }
  return found.data as T;
}

/**
 * A request of content rather than JSON, with the session's credentials. Throws ApiError.
 */
export async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (!SAFE.has(init.method ?? "GET")) headers.set("X-CSRF-Token", credentials.csrfToken);
  let response;
  try {
    response = await fetch(path, { ...init, headers, credentials: "same-origin" });
  } catch (thrown) {
    if (init.signal?.aborted) throw thrown;
    throw ApiError.of(thrown);
  }
  if (response.status === 401) credentials.onEnded();
  if (!response.ok) throw await ApiError.from(response);
  return response;
}
