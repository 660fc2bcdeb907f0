package smtprelay_test

import (
	"context"
	"fmt"
	"log"
	"slices"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

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
