interface Refusal {
  message: string;
  hint: string;
}

export const UNKNOWN: Refusal = {
  message: "The provider did not say who you are",
  hint: "try again in a moment",
};

/** Why a provider's login did not succeed, by the `error` that the control plane sends back. */
export const REFUSALS: Record<string, Refusal> = {
  access_denied: { message: "The provider refused", hint: "allow the access that it asks for" },
  invalid_state: {
    message: "The login took too long, or was begun elsewhere",
    hint: "begin it again in this window",
  },
  missing_code: { message: "The provider sent no code", hint: "begin again" },
  exchange_failed: UNKNOWN,
  no_email: {
    message: "Your account there has no proven e-mail address",
    hint: "verify your primary address there, then try again",
  },
  email_taken: {
    message: "There is an account with that e-mail address already",
    hint: "log in with your password, then connect the provider in your settings",
  },
  no_account: {
    message: "There is no account for you here",
    hint: "ask for an invitation, and open its link",
  },
  invalid_invitation: {
    message: "The invitation is used, withdrawn or too old",
    hint: "ask for another one",
  },
  account_deactivated: {
    message: "Your account is disabled",
    hint: "ask whoever administers the platform",
  },
  already_linked: {
    message: "That account there belongs to somebody else here",
    hint: "log in with it, or disconnect it there first",
  },
};
