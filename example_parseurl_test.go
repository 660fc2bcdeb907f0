package smtprelay_test

import (
	"fmt"
	"log"

	"github.com/smtprelay/smtprelay"
)

// A service with one setting for its mail.
func ExampleParseURL() {
	cfg, err := smtprelay.ParseURL("smtps://apikey:SG.secret@smtp.sendgrid.net:465?max_conns=4")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(cfg.Addr, cfg.Username, cfg.Limits.MaxConns)
	fmt.Println(cfg.TLS == smtprelay.TLSImplicit)
	// Output:
	// smtp.sendgrid.net:465 apikey 4
	// true
}
