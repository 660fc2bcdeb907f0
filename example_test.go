// Examples of the calls: sending one message and many, checking the relay, ending, reading a URL. A longer wish has a file of its own.
package smtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A mail to one recipient. A program makes one Client, at its start, and shares it.
func ExampleClient_Send() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config()) // really: smtprelay.Config{Password: os.Getenv("SENDGRID_API_KEY")}
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("From: shop@example.com\r\n" +
			"To: ann@example.org\r\n" +
			"Subject: Your order\r\n" +
			"\r\n" +
			"It is ready.\r\n")),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(receipt.Code, receipt.Recipients[0].To, receipt.Recipients[0].Outcome)
	fmt.Println("the relay names it:", receipt.QueueID == relay.Messages()[0].ID)
	// Output:
	// 250 ann@example.org accepted
	// the relay names it: true
}

// A mail to each of many recipients, as many at a time as the connections can carry. The messages are made as they are
// needed, and results come in the order of completion.
func ExampleClient_SendAll() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	readers := []string{"ann@example.org", "bob@example.org", "gone@example.org", "eve@example.org"}
	messages := func(yield func(smtprelay.Message) bool) {
		for _, to := range readers {
			text := "From: news@example.com\r\nTo: " + to + "\r\nSubject: News\r\n\r\nThere is news.\r\n"
			if !yield(smtprelay.Message{
				From: "news@example.com",
				To:   []string{to},
				Body: smtprelay.Bytes([]byte(text)),
			}) {
				return
			}
		}
	}
	var lines []string
	for r := range client.SendAll(context.Background(), messages) {
		if r.Err != nil {
			lines = append(lines, fmt.Sprint(r.Message.To[0], ": ", r.Err))
		} else {
			lines = append(lines, fmt.Sprint(r.Message.To[0], ": accepted"))
		}
	}
	slices.Sort(lines)
	for _, line := range lines {
		fmt.Println(line)
	}
	// Output:
	// ann@example.org: accepted
	// bob@example.org: accepted
	// eve@example.org: accepted
	// gone@example.org: smtprelay: RCPT TO <gone@example.org>: 550 5.1.1 "no such user"
}

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

// The end of a program: take no more, finish what is under way, say QUIT, and do not wait for ever.
func ExampleClient_Shutdown() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	msg := []byte("Subject: hello\r\n\r\nHello.\r\n")
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, msg))

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	fmt.Println(client.Shutdown(ctx))

	err = client.SendMail("shop@example.com", []string{"bob@example.org"}, msg)
	fmt.Println(errors.Is(err, smtprelay.ErrClosed), smtprelay.SafeToRetry(err))
	// Output:
	// <nil>
	// <nil>
	// true true
}

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
