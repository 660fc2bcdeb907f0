// Here belongs the example of an outbox in a folder.
package sqlitestore_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A mail that was promised: once Enqueue has returned nil it is in the folder, and is sent although the process is killed.
func Example() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	dir, err := os.MkdirTemp("", "outbox") // really: /var/lib/shop/outbox
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	store, err := sqlitestore.Open(dir)
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

	for range 2 { // the same ID again adds nothing
		err := box.Enqueue(ctx, outbox.Message{
			ID:        "order-4711",
			From:      "shop@example.com",
			To:        []string{"ann@example.org"},
			Body:      smtprelay.Bytes([]byte("From: shop@example.com\r\nTo: ann@example.org\r\nSubject: Your order\r\n\r\nIt is ready.\r\n")),
			NotBefore: time.Now().Add(time.Millisecond), // zero: at once
		})
		if err != nil {
			log.Fatal(err) // not promised
		}
	}
	i := <-ended
	fmt.Println(i.ID, i.State)

	stop() // finishes what is being sent
	fmt.Println(<-ran, len(relay.Messages()))
	// Output:
	// order-4711 accepted
	// <nil> 1
}
