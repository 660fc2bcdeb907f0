// Here belongs the example of a message of HTML with an attachment.
package relaymailyak_test

import (
	"context"
	"fmt"
	"log"
	"strings"

	"github.com/domodwyer/mailyak/v3"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relaymailyak"
	"github.com/smtprelay/smtprelay/smtptest"
)

// HTML and an attachment, built as ever; the blind copy is in no header.
func ExampleSend() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config()) // one for the program
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	m := mailyak.New("", nil)
	m.From("shop@example.com")
	m.FromName("The Shop")
	m.To("ann@example.org")
	m.Bcc("archive@example.com")
	m.Subject("Your order")
	m.Plain().Set("It is ready.")
	m.HTML().Set("<p>It is <b>ready</b>.</p>")
	m.Attach("invoice.csv", strings.NewReader("item,price\nteapot,12.50\n"))

	fmt.Println(relaymailyak.Send(context.Background(), client, m))
	fmt.Println(relay.Messages()[0].To)
	// Output:
	// <nil>
	// [ann@example.org archive@example.com]
}
