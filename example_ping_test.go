package smtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// At the start of a service: are address and key right? Better known now than at the first mail.
func ExampleClient_Ping() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Password = "yesterday's key"
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // a relay may say nothing at all
	defer cancel()
	err = client.Ping(ctx)
	var e *smtprelay.Error
	if errors.As(err, &e) {
		fmt.Println(e.Op, e.Code, e.Temporary())
	}
	// Output:
	// AUTH 535 false
}
