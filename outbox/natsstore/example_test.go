// Here belongs the example of an outbox in JetStream.
package natsstore_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A worker, which may run on several machines at once. Here the server is in the same process; three of their own would be named by
// natsstore.Connect("nats://one:4222,nats://two:4222,nats://three:4222").
func Example() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	dir, err := os.MkdirTemp("", "nats")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	server, err := embedded.Start(embedded.Config{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	nc, err := server.Connect()
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()

	store, err := natsstore.New(nc, natsstore.Options{}) // with three servers: Replicas: 3
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	ended := make(chan outbox.Item, 1)
	box, err := outbox.New(outbox.Config{Store: store, Client: client, Ended: func(i outbox.Item) { ended <- i }})
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- box.Run(ctx) }() // from the start of the program to its end

	err = box.Enqueue(ctx, outbox.Message{
		ID:   "order-4711", // the same ID again adds nothing
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("From: shop@example.com\r\nTo: ann@example.org\r\nSubject: Your order\r\n\r\nIt is ready.\r\n")),
	})
	if err != nil {
		log.Fatal(err) // not promised
	}
	i := <-ended
	fmt.Println(i.ID, i.State)

	stop() // finishes what is being sent
	fmt.Println(<-ran, len(relay.Messages()))
	// Output:
	// order-4711 accepted
	// <nil> 1
}
