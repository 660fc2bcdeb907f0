module github.com/smtprelay/smtprelay

go 1.26.0
