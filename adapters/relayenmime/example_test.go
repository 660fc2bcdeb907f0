// Here belongs the example of a message of HTML with an attachment.
package relayenmime_test

import (
	"context"
	"fmt"
	"log"

	"github.com/jhillyerd/enmime/v2"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relayenmime"
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

	b := enmime.Builder().
		From("The Shop", "shop@example.com").
		To("", "ann@example.org").
		BCC("", "archive@example.com").
		Subject("Your order").
		Text([]byte("It is ready.")).
		HTML([]byte("<p>It is <b>ready</b>.</p>")).
		AddAttachment([]byte("item,price\nteapot,12.50\n"), "text/csv", "invoice.csv")

	fmt.Println(relayenmime.Send(context.Background(), client, b))
	fmt.Println(relay.Messages()[0].To)
	// Output:
	// <nil>
	// [ann@example.org archive@example.com]
}
