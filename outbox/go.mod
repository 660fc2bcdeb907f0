module github.com/smtprelay/smtprelay/outbox

go 1.26.0

require github.com/smtprelay/smtprelay v0.0.0

require (
	github.com/emersion/go-sasl v0.0.0-20241020182733-b788ff22d5a6 // indirect
	github.com/emersion/go-smtp v0.25.1 // indirect
	golang.org/x/sync v0.25.0 // indirect
)

replace github.com/smtprelay/smtprelay => ../
