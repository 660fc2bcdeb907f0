// Here belongs the example of processes that share an allowance.
package fileslots_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/fileslots"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Each process does this. The relay sees three connections at most, however many there are of them.
func ExampleNew() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	dir, err := os.MkdirTemp("", "slots") // really: /run/shop/relay
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	slots, err := fileslots.New(dir, 3, 0) // the same number in each process
	if err != nil {
		log.Fatal(err)
	}
	cfg := relay.Config()
	cfg.Limits.Slots = slots
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	messages := func(yield func(smtprelay.Message) bool) {
		for range 50 {
			m := smtprelay.Message{From: "news@example.com", To: []string{"ann@example.org"}, Body: smtprelay.Bytes([]byte("Subject: news\r\n\r\nNews.\r\n"))}
			if !yield(m) {
				return
			}
		}
	}
	accepted := 0
	for r := range client.SendAll(context.Background(), messages) {
		if r.Err != nil {
			log.Fatal(r.Err)
		}
		accepted++
	}
	fmt.Println(accepted, relay.Stats().MaxOpen <= 3)
	// Output:
	// 50 true
}
