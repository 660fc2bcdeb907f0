// Here belong the examples of more than one Client: the Registry and fail-over.
package smtprelay_test

import (
	"context"
	"fmt"
	"log"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A program with many tenants learns with each message which relay it is for.
func ExampleRegistry() {
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS = true
	relay.Start()
	defer relay.Close()
	tenants := map[string]string{"shop": relay.URL()} // from a database

	var clients smtprelay.Registry // one for the whole program
	defer clients.Shutdown(context.Background())
	for range 3 {
		cfg, err := smtprelay.ParseURL(tenants["shop"])
		if err != nil {
			log.Fatal(err)
		}
		cfg.Name = "shop" // needed only with a TLSConfig, an Auth, a Dial or a Trace
		_, err = clients.Send(context.Background(), cfg, smtprelay.Message{
			From: "shop@example.com",
			To:   []string{"ann@example.org"},
			Body: smtprelay.Bytes(order),
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(len(relay.Messages()), "messages,", len(relay.Conns()), "connection")
	// Output: 3 messages, 1 connection
}

func ExampleFailover() {
	first, second := smtptest.NewServer(), smtptest.NewServer()
	defer first.Close()
	defer second.Close()
	first.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "554 5.3.2 down for maintenance", Count: -1})

	var clients []*smtprelay.Client
	for _, relay := range []*smtptest.Server{first, second} {
		cfg := relay.Config()
		cfg.Retry.MaxAttempts = 1 // another relay is the next try
		client, err := smtprelay.New(cfg)
		if err != nil {
			log.Fatal(err)
		}
		clients = append(clients, client)
	}
	mail := smtprelay.NewFailover(clients...)
	defer mail.Shutdown(context.Background())
	_, err := mail.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes(order),
	})
	fmt.Println(err, len(first.Messages()), len(second.Messages()))
	// Output: <nil> 0 1
}

func ExampleMessageOf() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	var msg smtprelay.GoMail = &goMail{from: "<shop@example.com>", to: []string{"<ann@example.org>"}} // a *mail.Msg of go-mail
	m, err := smtprelay.MessageOf(msg)
	if err != nil {
		log.Fatal(err)
	}
	_, err = client.Send(context.Background(), m)
	fmt.Println(m.From, m.To, err)
	// Output: shop@example.com [ann@example.org] <nil>
}
