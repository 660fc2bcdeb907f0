// Here belongs the example of a message of HTML with an attachment.
package relaygomail_test

import (
	"context"
	"fmt"
	"io"
	"log"

	"gopkg.in/gomail.v2"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relaygomail"
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

	m := gomail.NewMessage()
	m.SetAddressHeader("From", "shop@example.com", "The Shop")
	m.SetHeader("To", "ann@example.org")
	m.SetHeader("Bcc", "archive@example.com")
	m.SetHeader("Subject", "Your order")
	m.SetBody("text/plain", "It is ready.")
	m.AddAlternative("text/html", "<p>It is <b>ready</b>.</p>")
	m.Attach("invoice.csv", gomail.SetCopyFunc(func(w io.Writer) error {
		_, err := io.WriteString(w, "item,price\nteapot,12.50\n")
		return err
	}))

	fmt.Println(relaygomail.Send(context.Background(), client, m))
	fmt.Println(relay.Messages()[0].To)
	// Output:
	// <nil>
	// [ann@example.org archive@example.com]
}
