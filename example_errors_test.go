// Examples of what a failed Send tells, and of sending again.
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

// What a service does with an error: its Outcome says whether the message may be sent again, and to whom.
func ExampleError() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{
		"gone@example.org": "550 5.1.1 no such user",
		"full@example.org": "452 4.2.2 mailbox full",
	}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	send := func(to ...string) {
		receipt, err := client.Send(context.Background(), smtprelay.Message{
			From: "shop@example.com",
			To:   to,
			Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
		})
		var e *smtprelay.Error
		switch {
		case err == nil:
			fmt.Println("accepted for all, code", receipt.Code)
		case !errors.As(err, &e) || e.Outcome == smtprelay.Unknown:
			fmt.Println("perhaps accepted: a person decides")
		case e.Outcome == smtprelay.Accepted:
			for _, r := range e.Refused {
				fmt.Println("accepted, but not for", r.To, "who got", r.Code)
			}
		case e.Temporary():
			fmt.Println("later:", e.Code)
		default:
			fmt.Println("never:", e.Code)
		}
	}
	send("ann@example.org")
	send("ann@example.org", "gone@example.org")
	send("full@example.org")
	send("gone@example.org")

	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Drop: true}) // the connection is lost before the reply
	send("ann@example.org")
	// Output:
	// accepted for all, code 250
	// accepted, but not for gone@example.org who got 550
	// later: 452
	// never: 550
	// perhaps accepted: a person decides
}

// A relay with greylisting refuses the first try of each new recipient with a 4yz reply. By default that is told to the
// caller, who knows better how long the message can wait; with Temporary the client tries again by itself.
func ExampleRetry() {
	relay := smtptest.NewServer()
	defer relay.Close()
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 greylisted, try again"})

	cfg := relay.Config()
	cfg.Retry = smtprelay.Retry{
		Temporary:   true,
		MaxAttempts: 3,
		MinBackoff:  time.Millisecond, // really: minutes, for greylisting, since a random part is waited
		MaxBackoff:  10 * time.Millisecond,
	}
	cfg.Trace = &smtprelay.Trace{
		Retry: func(_ context.Context, attempt int, _ time.Duration, err error) {
			fmt.Printf("try %d failed: %v\n", attempt, err)
		},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
	})
	fmt.Println(receipt.Code, err)
	// Output:
	// try 1 failed: smtprelay: RCPT TO <ann@example.org>: 451 4.7.1 "greylisted, try again"
	// 250 <nil>
}

// SafeToRetry is the one question before a message goes back into a queue.
func ExampleSafeToRetry() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	m := smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
	}

	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "451 4.3.0 try again later"})
	_, err = client.Send(context.Background(), m)
	fmt.Println(smtprelay.SafeToRetry(err), err)

	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true}) // taken, and lost before the relay could say so
	_, err = client.Send(context.Background(), m)
	fmt.Println(smtprelay.SafeToRetry(err))
	fmt.Println("at the relay:", relay.Accepted())
	// Output:
	// true smtprelay: final dot: 451 4.3.0 "try again later"
	// false
	// at the relay: 1
}
