// Here belongs the example of a message of HTML with an attachment.
package relayemail_test

import (
	"context"
	"fmt"
	"log"
	"strings"

	"github.com/jordan-wright/email"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relayemail"
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

	e := email.NewEmail()
	e.From = "The Shop <shop@example.com>"
	e.To = []string{"ann@example.org"}
	e.Bcc = []string{"archive@example.com"}
	e.Subject = "Your order"
	e.Text = []byte("It is ready.")
	e.HTML = []byte("<p>It is <b>ready</b>.</p>")
	if _, err := e.Attach(strings.NewReader("item,price\nteapot,12.50\n"), "invoice.csv", "text/csv"); err != nil {
		log.Fatal(err)
	}

	fmt.Println(relayemail.Send(context.Background(), client, e))
	fmt.Println(relay.Messages()[0].To)
	// Output:
	// <nil>
	// [ann@example.org archive@example.com]
}
