package smtpapi_test

// One example for each wish, sent to a fake relay.

import (
	"context"
	"fmt"
	"log"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtpapi"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Keep statistics under two categories, and get the order's number back with each event.
func Example_categories() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	h := smtpapi.Header{
		Category:   []string{"orders", "shipping"},
		UniqueArgs: map[string]string{"order": "12345"},
	}
	if err := h.Check(); err != nil {
		log.Fatal(err)
	}
	_, err = client.Send(context.Background(), smtprelay.Message{
		From: "bounces@example.com", // SendGrid says here what it could not read
		To:   []string{"ann@example.org"},
		Body: smtpapi.Prepend(h, smtprelay.Bytes([]byte("Subject: Your order\r\nMessage-ID: <order-12345@example.com>\r\n"+
			"List-Unsubscribe: <https://example.com/unsubscribe>\r\n\r\nIt is on its way.\r\n"))),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(strings.ReplaceAll(string(relay.Messages()[0].Body), "\r\n", "\n"))
	// Output:
	// X-SMTPAPI: {"category":["orders","shipping"],"unique_args":{"order":"12345"}}
	// Subject: Your order
	// Message-ID: <order-12345@example.com>
	// List-Unsubscribe: <https://example.com/unsubscribe>
	//
	// It is on its way.
}

// Send one message to 1,000 recipients, each with the own name in it. The relay gets one recipient, which is not in To.
func Example_substitution() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	var to, names []string
	for i := range 1000 {
		to = append(to, fmt.Sprintf("user%d@example.org", i))
		names = append(names, fmt.Sprintf("Zoë %d", i))
	}
	h := smtpapi.Header{To: to, Sub: map[string][]string{"-name-": names}}
	if err := h.Check(); err != nil {
		log.Fatal(err)
	}
	_, err = client.Send(context.Background(), smtprelay.Message{
		From: "bounces@example.com",
		To:   []string{"newsletter@example.com"},
		Body: smtpapi.Prepend(h, smtprelay.Bytes([]byte("Subject: Hello, -name-\r\nMessage-ID: <news-1@example.com>\r\n"+
			"List-Unsubscribe: <https://example.com/unsubscribe>\r\n\r\nDear -name-, …\r\n"))),
	})
	if err != nil {
		log.Fatal(err)
	}
	lines := strings.Split(string(relay.Messages()[0].Body), "\r\n")
	fmt.Println(len(relay.Messages()), "message to", relay.Messages()[0].To)
	fmt.Println(lines[0])
	fmt.Println(lines[1])
	// Output:
	// 1 message to [newsletter@example.com]
	// X-SMTPAPI: {"to":["user0@example.org","user1@example.org","user2@example.org",
	//  "user3@example.org","user4@example.org","user5@example.org",
}

// Send later, and be able to cancel until then.
func Example_scheduling() {
	h := smtpapi.Header{
		SendAt:  time.Now().Add(4 * time.Hour),
		BatchID: "MWQxZmIyODYtNjE1Ni0xMWU1LWI3ZTUtMDgwMDI3OGJkMmY2LWEzMmViMjYxMw", // from POST /v3/mail/batch
	}
	fmt.Println(h.Check())

	// One time for each recipient goes by the order of To.
	h = smtpapi.Header{
		To:         []string{"ann@example.org", "bob@example.org"},
		SendAt:     time.Now().Add(time.Hour),
		SendEachAt: []time.Time{time.Now().Add(time.Hour)},
	}
	fmt.Println(h.Check()) // all mistakes at once
	// Output:
	// <nil>
	// smtpapi: send_each_at has 1 values and to 2: want one for each recipient
	// smtpapi: send_at and send_each_at are both set: SendGrid drops such a message
}

// Send for an unsubscribe group, and offer two groups to those who manage their preferences.
func Example_unsubscribeGroup() {
	h := smtpapi.Header{ASMGroupID: 42, ASMGroupsToDisplay: []int{42, 43}}
	field, err := h.Marshal()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s", field)
	// Output: X-SMTPAPI: {"asm_group_id":42,"asm_groups_to_display":[42,43]}
}

// Let a reader unsubscribe with one click in the mail program (RFC 8058), and by SendGrid's group.
func Example_oneClickUnsubscribe() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	text := "From: news@example.com\r\nTo: ann@example.org\r\nSubject: News\r\n" +
		"List-Unsubscribe: <https://example.com/unsubscribe/ann-7f3a>\r\n" + // answers POST, and needs no login
		"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" +
		"\r\nThere is news.\r\n"
	_, err = client.Send(context.Background(), smtprelay.Message{
		From: "news@example.com",
		To:   []string{"ann@example.org"},
		Body: smtpapi.Prepend(smtpapi.Header{ASMGroupID: 42}, smtprelay.Bytes([]byte(text))),
	})
	header, _, _ := strings.Cut(strings.ReplaceAll(string(relay.Messages()[0].Body), "\r\n", "\n"), "\n\n")
	fmt.Println(err)
	fmt.Println(header)
	// Output:
	// <nil>
	// X-SMTPAPI: {"asm_group_id":42}
	// From: news@example.com
	// To: ann@example.org
	// Subject: News
	// List-Unsubscribe: <https://example.com/unsubscribe/ann-7f3a>
	// List-Unsubscribe-Post: List-Unsubscribe=One-Click
}

// Turn off the tracking of clicks for a message whose links must stay as they are.
func Example_filters() {
	h := smtpapi.Header{Filters: smtpapi.Filters{
		ClickTrack: &smtpapi.ClickTrack{Enable: false},
		Templates:  &smtpapi.Templates{Enable: true, TemplateID: "5997fcf6-2b9f-484d-acd5-7e9a99f0dc1f"},
	}}
	field, err := h.Marshal()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(strings.ReplaceAll(string(field), "\r\n", "\n"))
	// Output:
	// X-SMTPAPI: {"filters":{"clicktrack":{"settings":{"enable":0,"enable_text":
	//  false}},"templates":{"settings":{"enable":1,"template_id":
	//  "5997fcf6-2b9f-484d-acd5-7e9a99f0dc1f"}}}}
}
