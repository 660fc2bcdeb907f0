// Here belongs the example of machines that share an allowance. It is compiled, and not run: it wants three servers.
package natsslots_test

import (
	"context"
	"log"
	"os"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/natsslots"
)

// Each machine does this. The relay sees a hundred connections at most, however many machines there are.
func ExampleNew() {
	nc, err := natsslots.Connect("nats://one:4222,nats://two:4222,nats://three:4222")
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		log.Fatal(err)
	}
	slots, err := natsslots.New(context.Background(), js, "relay-slots", 100, natsslots.Options{Replicas: 3})
	if err != nil {
		log.Fatal(err)
	}
	defer slots.Close() // after the Client

	cfg, err := smtprelay.ParseURL(os.Getenv("SMTP_URL"))
	if err != nil {
		log.Fatal(err)
	}
	cfg.Limits.MaxConns = 100 // of one machine: it may have all of them
	cfg.Limits.Slots = slots
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
}
