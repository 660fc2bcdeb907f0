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

	// The relay takes the message, but the connection is lost before it can say so.
	lost := relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
	_, err = client.Send(context.Background(), message)

	var e *smtprelay.Error
	fmt.Println("an error:", errors.As(err, &e))
	fmt.Println("the outcome:", e.Outcome)
	fmt.Println("safe to send again:", smtprelay.SafeToRetry(err))
	fmt.Println("faults, messages:", lost.Hits(), len(relay.Messages()))
	// Output:
	// an error: true
	// the outcome: unknown
	// safe to send again: false
	// faults, messages: 1 1
}
