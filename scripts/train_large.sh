#!/usr/bin/env bash
# Train GPT-2 large; options as in scripts/train.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" large "$@"
