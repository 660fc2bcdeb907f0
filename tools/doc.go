// Package tools holds no code: its go.mod pins staticcheck ("go tool staticcheck"). Below it are the programs that check this
// repository: api, docs and mutants. They are a module of their own so that what they need is nobody's dependency.
package tools
