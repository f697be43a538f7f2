#!/usr/bin/env bash
# The dashboard's own steps; scripts/ calls them. Node comes with the Python environment.
#   build      into the Python package, unless what is there was built of the same sources
#   generate   the API's types, from the control plane's OpenAPI document
#   check      types, lint, format, and whether the API's types are those of the code
#   test       what needs no browser
set -euo pipefail
cd "$(dirname "$0")"
PATH="$(cd .. && pwd)/.venv/bin:$PATH"
out=../src/sandmartin/control/web

install() {
    local stamp
    stamp=node_modules/.locked-$(cat package.json package-lock.json | sha256sum | cut -c1-16)
    [ ! -e "$stamp" ] || return 0
    npm ci --no-audit --no-fund --silent
    touch "$stamp"
}

types() { # types FILE
    python openapi.py >node_modules/openapi.json
    npx openapi-typescript node_modules/openapi.json --default-non-nullable=false --output "$1" >/dev/null
}

case "${1:-}" in
build)
    sources=$(find index.html package-lock.json vite.config.ts svelte.config.js public src -type f |
        LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16)
    [ "$(cat "$out/.built" 2>/dev/null)" != "$sources" ] || exit 0
    echo "building the dashboard" >&2
    install
    npx vite build --logLevel warn
    echo "$sources" >"$out/.built"
    ;;
generate)
    install
    types src/api/schema.d.ts
    ;;
check)
    install
    types node_modules/schema.d.ts
    cmp -s node_modules/schema.d.ts src/api/schema.d.ts || {
        echo "dashboard/src/api/schema.d.ts is not that of the API: run scripts/generate" >&2
        exit 1
    }
    npm run --silent types
    npm run --silent lint
    ;;
test)
    install
    npm test --silent
    ;;
*)
    sed -n '2,7s/^# \{0,1\}//p' build.sh >&2
    exit 2
    ;;
esac
