module github.com/smtprelay/smtprelay/examples/bulk

go 1.26.0

replace github.com/smtprelay/smtprelay => ../..

require (
	github.com/schollz/progressbar/v3 v3.19.1
	github.com/smtprelay/smtprelay v0.0.0
	golang.org/x/term v0.48.0
)

require (
	github.com/emersion/go-sasl v0.0.0-20241020182733-b788ff22d5a6 // indirect
	github.com/emersion/go-smtp v0.25.1 // indirect
	github.com/mitchellh/colorstring v0.0.0-20190213212951-d06e56a500db // indirect
	github.com/rivo/uniseg v0.4.7 // indirect
	golang.org/x/sync v0.25.0 // indirect
	golang.org/x/sys v0.50.0 // indirect
)
