package smtptest_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

var message = smtprelay.Message{
	From: "shop@example.com",
	To:   []string{"ann@example.org"},
	Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is on its way.\r\n")),
}

func ExampleServer() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, _ := smtprelay.New(relay.Config())
	defer client.Close()
	_, err := client.Send(context.Background(), message)

	m := relay.Messages()[0]
	fmt.Printf("%v: %s to %s, %q", err, m.From, m.To, m.Body)
	// Output: <nil>: shop@example.com to [ann@example.org], "Subject: Your order\r\n\r\nIt is on its way.\r\n"
}

func ExampleServer_Fault() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	// The relay accepts the message, but the connection is lost before its reply.
	lost := relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
	_, err = client.Send(context.Background(), message)

	var e *smtprelay.Error
	fmt.Println("an error:", errors.As(err, &e))
	fmt.Println("the outcome:", e.Outcome)
	fmt.Println("safe to send again:", smtprelay.ShouldRetry(err))
	fmt.Println("faults, messages:", lost.Hits(), len(relay.Messages()))
	// Output:
	// an error: true
	// the outcome: unknown
	// safe to send again: false
	// faults, messages: 1 1
}

// Some recipients do not exist.
func ExampleServer_reject() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{"bob@example.org": "550 5.1.1 no such user"}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	m := message
	m.To = []string{"ann@example.org", "bob@example.org"}
	_, err = client.Send(context.Background(), m)
	var e *smtprelay.Error
	if errors.As(err, &e) {
		bob := e.Recipients[1]
		fmt.Println(e.Outcome, "but not for", bob.To, "because of", bob.Reply.Code)
	}
	fmt.Println("delivered to", relay.Messages()[0].To)
	// Output:
	// accepted but not for bob@example.org because of 550
	// delivered to [ann@example.org]
}
