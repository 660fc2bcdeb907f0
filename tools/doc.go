// Package tools holds no code: its go.mod pins the programs that check this repository ("go tool staticcheck"), in a module
// of its own so that they are nobody's dependency.
package tools
