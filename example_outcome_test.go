package smtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"log"

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
