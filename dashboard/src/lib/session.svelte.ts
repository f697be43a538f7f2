/** Who is logged in, and for which team they act. */
import { answer, api, credentials, type Schemas } from "../api/client";
import { Events } from "../api/events";

export type Me = Schemas["Me"];
export type Team = Schemas["TeamBody"];

class Session {
  /** Null when nobody is logged in; undefined until that is known. */
  me = $state<Me | null | undefined>(undefined);
  /** Whether the team's events arrive. */
  connected = $state(true);
  readonly events = new Events((connected) => (this.connected = connected));

  constructor() {
    credentials.onEnded = () => this.#set(null);
  }

  /** The team that is acted for. */
  get team(): Team | null {
    return this.me?.teams.find((each) => each.id === this.me?.team_id) ?? null;
  }

  /** Whether one may invite, remove and rename. */
  get managesTeam(): boolean {
    return this.team?.role === "owner" || this.team?.role === "admin";
  }

  /** Finds out whose cookie the browser has. Throws ApiError for all but "nobody's". */
  async find(): Promise<void> {
    const { data, error, response } = await api.GET("/v1/me");
    if (response.ok) this.#set(data as Me);
    else if (response.status === 401) this.#set(null);
    else await answer(Promise.resolve({ error, response }));
  }

  async logIn(email: string, password: string): Promise<void> {
    this.#set(await answer(api.POST("/v1/auth/login", { body: { email, password } })));
  }

  async signUp(body: Schemas["SignUpBody"]): Promise<void> {
    this.#set(await answer(api.POST("/v1/auth/signup", { body })));
  }

  async logOut(): Promise<void> {
    await answer(api.POST("/v1/auth/logout"));
    this.#set(null);
  }

  /** Acts for another team from now on. */
  async switchTo(teamId: string): Promise<void> {
    this.#set(await answer(api.POST("/v1/auth/switch-team", { body: { team_id: teamId } })));
    this.events.forget();
  }

  #set(me: Me | null): void {
    credentials.csrfToken = me?.csrf_token ?? "";
    this.me = me;
  }
}

export const session = new Session();
