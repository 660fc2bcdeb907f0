// Package tools has no code: its go.mod pins staticcheck ("go tool staticcheck"). Below it are the programs that check this
// repository: api, docs and mutants. They are a separate module, so that users do not depend on what they need.
package tools
